"""How well embeddings of words agree with what people say of their similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from torch import Tensor
from torch.nn.functional import cosine_similarity

from softsphere_lab.data.sources import chosen
from softsphere_lab.data.text import UNKNOWN
from softsphere_lab.errors import LabError

__all__ = ["FEWEST_PAIRS", "Pair", "Similarity", "load_pairs", "spearman"]

# Two words, and how similar people say that they are.
Pair = tuple[str, str, float]

FILES = {
    "simlex999": "word-similarity/simlex999.txt",
    "wordsim353": "word-similarity/wordsim353.tsv",
}
# Any two pairs are ranked alike or the other way round.
FEWEST_PAIRS = 3
# Cosines of parallel embeddings differ by rounding alone, which is nothing to rank.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Similarity:
    """Spearman's rank correlation, None where there is none to give.

    pairs: that there are; covered: of them, those both of whose words have an embedding.
    """

    correlation: float | None
    pairs: int
    covered: int


def load_pairs(folder: Path | None = None) -> dict[str, list[Pair]]:
    """The pairs of simlex999 and wordsim353, of those that the folder has.

    folder: with word-similarity/simlex999.txt and wordsim353.tsv, two words and a score a line with
    tabs between and comments behind #; by default the environment variable SOFTSPHERE_DATA.
    Raises: LabError naming the file and the line that is not what it should be.
    """
    folder = chosen(folder)
    if folder is None:
        return {}
    paths = {name: folder / file for name, file in FILES.items()}
    return {name: read(path) for name, path in paths.items() if path.is_file()}


def read(path: Path) -> list[Pair]:
    """The pairs of a file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"--data-dir: cannot read {path} ({error})") from error
    return [
        parsed(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]


def parsed(line: str, place: str) -> Pair:
    """Two words and their score. place: what an error calls the line."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) != 3 or not all(fields):
        raise LabError(
            f"--data-dir: {place} must be two words and a score with tabs between, got {line!r:.60}"
        )
    try:
        score = float(fields[2])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise LabError(f"--data-dir: {place} must end in a finite score, got {fields[2]!r:.40}")
    return fields[0], fields[1], score


def spearman(words: Sequence[str], embeddings: Tensor, pairs: Sequence[Pair]) -> Similarity:
    """The correlation of the cosine similarity of two words with their score, over the pairs.

    None for fewer than FEWEST_PAIRS covered, where the cosines or the scores are all the same, and
    where a cosine is not finite. The case of letters does not count; of words that differ by it
    alone the first has its say. The unknown word is none.

    words: D; embeddings: (D, d), of any dtype and device.
    Raises: ValueError where there is not an embedding a word.

    >>> import torch
    >>> people = [("cat", "dog", 9.0), ("cat", "car", 2.0), ("dog", "car", 1.0), ("a", "b", 5.0)]
    >>> spearman(["cat", "dog", "car"], torch.tensor([[1.0, 0.2], [1.0, 0.0], [0.0, 1.0]]), people)
    Similarity(correlation=1.0, pairs=4, covered=3)
    """
    if embeddings.dim() != 2 or len(embeddings) != len(words):
        raise ValueError(
            f"embeddings must have a row for each of {len(words)} words, got "
            f"{tuple(embeddings.shape)}"
        )
    number: dict[str, int] = {}
    for i, word in enumerate(words):
        if word != UNKNOWN:
            number.setdefault(word.lower(), i)
    known = [
        (number[one.lower()], number[other.lower()], score)
        for one, other, score in pairs
        if one.lower() in number and other.lower() in number
    ]
    if len(known) < FEWEST_PAIRS:
        return Similarity(None, len(pairs), len(known))
    left, right, scores = map(list, zip(*known, strict=True))
    rows = embeddings.detach()
    cosines = cosine_similarity(rows[left].double(), rows[right].double(), dim=1).cpu().numpy()
    correlation = None
    # neither holds of what is not a number
    if np.ptp(cosines) > ROUNDING and np.ptp(scores) > 0:
        correlation = float(stats.spearmanr(cosines, scores).statistic)
    return Similarity(correlation, len(pairs), len(known))
