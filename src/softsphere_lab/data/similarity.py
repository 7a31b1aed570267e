"""How well embeddings of words agree with people's judgement of their similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import cosine_similarity

from softsphere_lab.data.sources import chosen
from softsphere_lab.data.text import UNKNOWN
from softsphere_lab.errors import LabError

__all__ = ["FEWEST_PAIRS", "Pair", "Similarity", "load_pairs", "spearman"]

# Two words and their similarity in the judgement of people.
Pair = tuple[str, str, float]

FILES = {
    "simlex999": "word-similarity/simlex999.txt",
    "wordsim353": "word-similarity/wordsim353.tsv",
}
# The rank correlation of two pairs is always 1 or −1.
FEWEST_PAIRS = 3
# Cosines of parallel embeddings differ by rounding alone, and are not ranked by it.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Similarity:
    """Spearman's rank correlation, or None where it is not defined.

    pairs: how many there are. covered: for how many of them both words have an embedding.
    """

    correlation: float | None
    pairs: int
    covered: int


def load_pairs(folder: Path | None = None) -> dict[str, list[Pair]]:
    """Returns the pairs of simlex999 and of wordsim353, as far as the folder has them.

    folder: has word-similarity/simlex999.txt and wordsim353.tsv, which have two words and a score
    in each line, with tabs between them, and comments that begin with #. The default is the
    environment variable SOFTSPHERE_DATA.
    Raises LabError with the file and the line that is not of this form.
    """
    folder = chosen(folder)
    if folder is None:
        return {}
    paths = {name: folder / file for name, file in FILES.items()}
    return {name: _read(path) for name, path in paths.items() if path.is_file()}


def _read(path: Path) -> list[Pair]:
    """The pairs of a file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"--data-dir: cannot read {path} ({error})") from error
    return [
        _parsed(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]


def _parsed(line: str, place: str) -> Pair:
    """Two words and their score. place: the name of the line in errors."""
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
    """Returns the correlation of the cosine similarity of two words with their score.

    It is None if fewer than FEWEST_PAIRS pairs are covered, if the cosines or the scores are all
    the same, and if a cosine is not finite. Letters of either case are the same; the first of
    several such words counts. The unknown word is not a word.

    words: D words. embeddings: (D, d), of any dtype and device.
    Raises ValueError if the number of embeddings is not that of the words.

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
    # NaN fails both comparisons
    if np.ptp(cosines) > ROUNDING and np.ptp(scores) > 0:
        from scipy import stats  # its import takes longer than that of the rest of a command

        correlation = float(stats.spearmanr(cosines, scores).statistic)
    return Similarity(correlation, len(pairs), len(known))
