"""Texts of words as numbers: sentences from a public set or a folder, and n-grams of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from softsphere.lab.errors import LabError

__all__ = ["Text", "load", "ngrams", "windows"]

END = "</s>"


@dataclass(frozen=True)
class Text:
    """Word numbers of the three parts (tokens), commonest first, and how often each occurs.

    words: the vocabulary; counts: (D) in the training part.
    """

    words: list[str]
    counts: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor


def sentences(name: str, folder: Path) -> dict[str, list[str]]:
    """The sentences of train, validation and test of folder/name."""
    import datasets

    files = {}
    for part in ("train", "validation", "test"):
        found = sorted(map(str, folder.glob(f"{name}/**/{part}*.parquet")))
        if not found:
            raise LabError(f"--data-dir {folder} has no {name}/{part}*.parquet")
        files[part] = found
    try:
        datasets.disable_progress_bars()
        parts = datasets.load_dataset("parquet", data_files=files)
    except Exception as error:  # the client raises dozens of kinds
        cause = " ".join(str(error).split())[:200]
        raise LabError(f"--data-dir {folder}: cannot read {name} ({cause})") from error
    if "sentence" not in parts["train"].column_names:
        came = ", ".join(parts["train"].column_names)
        raise LabError(f"--data-dir {folder}: {name} must have a column sentence, got {came}")
    return {part: list(parts[part]["sentence"]) for part in files}


def load(name: str, folder: Path) -> Text:
    """The text of that name; a word that the training part lacks is <unk>."""
    parts = sentences(name, folder)
    counts = Counter(word for sentence in parts["train"] for word in sentence.split())
    counts[END] = len(parts["train"])
    counts.setdefault("<unk>", 1)
    words = [word for word, _ in counts.most_common()]
    number = {word: i for i, word in enumerate(words)}
    unknown = number["<unk>"]

    def tokens(lines: Iterable[str]) -> Tensor:
        return torch.tensor(
            [number.get(word, unknown) for line in lines for word in [*line.split(), END]]
        )

    return Text(
        words,
        torch.tensor([float(counts[word]) for word in words]),
        tokens(parts["train"]),
        tokens(parts["validation"]),
        tokens(parts["test"]),
    )


def ngrams(tokens: Tensor, n: int, end: int) -> tuple[Tensor, Tensor]:
    """Contexts (N, n − 1) and next words (N); the text begins after ends of sentences."""
    padded = torch.cat([torch.full((n - 1,), end), tokens])
    return padded.unfold(0, n - 1, 1)[:-1], tokens


def windows(tokens: Tensor, length: int, end: int) -> tuple[Tensor, Tensor]:
    """Words (N, length), one after the other, and the word after each (N, length).

    The text begins after the end of a sentence; what does not fill a window is left out.
    """
    whole = len(tokens) // length * length
    before = torch.cat([torch.tensor([end]), tokens])[:whole]
    return before.view(-1, length), tokens[:whole].view(-1, length)
