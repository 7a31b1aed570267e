"""Where texts come from: public sets, sentences in a folder, and a small generated text."""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from softsphere_lab.data.sources import chosen, client, instead, local, public
from softsphere_lab.errors import LabError

__all__ = ["CORPORA", "Corpus", "read"]

PARTS = ("train", "validation", "test")
PTB = "ptb-text-only/ptb_text_only"
WIKIPEDIA = "wikimedia/wikipedia"
# The number of articles of each part; the hub has all of Wikipedia in one part.
ARTICLES = (4200, 128, 128)
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Corpus:
    """The lines of each part.

    split: returns the words of a line. fewest: how often a word must occur in the training part;
    rarer words are the unknown word.
    """

    parts: dict[str, list[str]]
    split: Callable[[str], list[str]] = str.split
    fewest: int = 1


def _ptb(folder: Path | None) -> Corpus:
    """The Penn Treebank in Mikolov's form, which already marks the unknown words."""
    if folder is not None:
        return _sentences("ptb", folder, instead(PTB))
    datasets = client()
    with public(PTB, "ptb", PARTS):
        # the main branch has a script, which the client no longer runs; this branch has its output
        parts = datasets.load_dataset(PTB, revision="refs/convert/parquet")
        rows = {part: parts[part] for part in PARTS}
    return Corpus(_columns(rows, "sentence", PTB))


def _sentences(name: str, folder: Path, otherwise: str = "") -> Corpus:
    """Text from a folder, whose column "sentence" has words with spaces between them."""
    parts = local(folder, name, PARTS, otherwise)
    return Corpus(_columns(parts, "sentence", f"--data-dir {folder}: {name}"))


def wikipedia(folder: Path | None) -> Corpus:
    r"""English Wikipedia in lower case, one paragraph in each line.

    Words are the matches of \w+(?:['’]\w+)* and all other characters but spaces. Words that occur
    less than three times are the unknown word.

    The hub has all articles in one part: the first 4,200 of them are trained on, and the next 128
    and 128 are held out. A folder may have other articles, so results on one are not to be compared
    with results on the other.
    """
    if folder is None:
        texts = _first_articles()
    else:
        rows = local(folder, "wikipedia", PARTS, instead(WIKIPEDIA))
        texts = _columns(rows, "text", f"--data-dir {folder}: wikipedia")
    return Corpus(
        {part: list(paragraphs(texts[part])) for part in PARTS}, split=WORD.findall, fewest=3
    )


def _first_articles() -> dict[str, list[str]]:
    """The texts of the hub's first articles; the others are not loaded."""
    datasets = client()
    with public(WIKIPEDIA, "wikipedia", PARTS):
        rows = datasets.load_dataset(WIKIPEDIA, "20231101.en", split="train", streaming=True)
        texts = (row["text"] for row in rows)
        return {part: list(islice(texts, n)) for part, n in zip(PARTS, ARTICLES, strict=True)}


def paragraphs(texts: Iterable[str]) -> Iterable[str]:
    """The lines that are not empty, in lower case."""
    return (line for text in texts for line in text.lower().split("\n") if line.strip())


def _columns(parts: Any, column: str, source: str) -> dict[str, list[str]]:
    """A column of text of every part. source: the name of the set in errors."""
    texts = {}
    for part in PARTS:
        if column not in parts[part].column_names:
            came = ", ".join(parts[part].column_names)
            raise LabError(f"{source}/{part} must have a column {column}, got {came}")
        texts[part] = list(parts[part][column][:])
        for row, value in enumerate(texts[part]):
            if not isinstance(value, str):
                raise LabError(
                    f"{source}/{part}: {column} must be text, got {value!r:.40} in row {row}"
                )
    return texts


# The generated text: its number of words; how many words often follow each word, and with which
# probability one of them does; the probability that a sentence ends after a word; and the number of
# words of each part, with the ends of sentences.
WORDS = 340
FOLLOWERS = 4
FOLLOWS = 0.8
ENDS = 0.1
SIZES = (6000, 1000, 1000)


def generated(folder: Path | None) -> Corpus:
    """A first-order Markov chain of 340 words w0, w1, … whose frequencies are about 1 / rank.

    Four words in five are one of the four that often follow the last word; the others are drawn
    without regard to it. The text is the same on every machine, since all chance comes from
    random.Random(0).random(), whose sequence Python promises to keep.
    """
    uniform = random.Random(0).random
    heights = list(accumulate(1 / rank for rank in range(1, WORDS + 1)))

    def drawn() -> int:
        return bisect(heights, heights[-1] * uniform())

    followers = [[drawn() for _ in range(FOLLOWERS)] for _ in range(WORDS)]

    def sentence() -> str:
        said = [drawn()]
        while uniform() >= ENDS:
            often = uniform() < FOLLOWS
            said.append(followers[said[-1]][int(FOLLOWERS * uniform())] if often else drawn())
        return " ".join(f"w{word}" for word in said)

    def part(size: int) -> list[str]:
        lines: list[str] = []
        while size > 0:
            lines.append(sentence())
            size -= len(lines[-1].split()) + 1
        return lines

    return Corpus({name: part(size) for name, size in zip(PARTS, SIZES, strict=True)})


CORPORA: dict[str, Callable[[Path | None], Corpus]] = {
    "ptb": _ptb,
    "wikipedia": wikipedia,
    "generated": generated,
}


def read(name: str, folder: Path | None) -> Corpus:
    """Returns the corpus of that name, or the sentences of that name in the folder.

    folder: see `text.load`.
    Raises LabError for an unknown set and for one that cannot be read, and says what would help.
    """
    if name == "generated" and folder is not None:
        raise LabError("--dataset generated is made, not read; leave --data-dir out")
    corpus = _found(name, chosen(folder))
    for part, lines in corpus.parts.items():
        if not lines:
            raise LabError(f"--dataset {name}: the {part} part must have words, got none")
    return corpus


def _found(name: str, folder: Path | None) -> Corpus:
    """The corpus of that name; all but the public ones are in the folder."""
    if name in CORPORA:
        return CORPORA[name](folder)
    known = ", ".join(CORPORA)
    if folder is None:
        raise LabError(
            f"--dataset must be one of {known}, or a set in a folder given by --data-dir, "
            f"got {name!r}"
        )
    return _sentences(name, folder, f"; or give --dataset one of {known}")
