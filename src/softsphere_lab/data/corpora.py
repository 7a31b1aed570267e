"""Where texts come from: public sets by name or from a folder, and a small generated one."""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from softsphere_lab.data.sources import chosen, instead, local, public
from softsphere_lab.errors import LabError

__all__ = ["CORPORA", "Corpus", "read"]

PARTS = ("train", "validation", "test")
PTB = "ptb-text-only/ptb_text_only"
WIKIPEDIA = "wikimedia/wikipedia"
# Articles of the three parts; the hub has all of Wikipedia in one.
ARTICLES = (4200, 128, 128)
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Corpus:
    """The sequences of words of each part, a line each.

    split: the words of a line; fewest: how often the training part must have a word for it not to
    be the unknown one.
    """

    parts: dict[str, list[str]]
    split: Callable[[str], list[str]] = str.split
    fewest: int = 1


def ptb(folder: Path | None) -> Corpus:
    """The Penn Treebank in Mikolov's form, whose words and unknown words are marked already."""
    if folder is not None:
        return sentences("ptb", folder, instead(PTB))
    import datasets

    with public(PTB, "ptb", PARTS):
        # the main branch holds a script, which the client runs no more; this one what it made
        parts = datasets.load_dataset(PTB, revision="refs/convert/parquet")
        rows = {part: parts[part] for part in PARTS}
    return Corpus(columns(rows, "sentence", PTB))


def sentences(name: str, folder: Path, otherwise: str = "") -> Corpus:
    """Any folder of rows whose column sentence has words between spaces."""
    parts = local(folder, name, PARTS, otherwise)
    return Corpus(columns(parts, "sentence", f"--data-dir {folder}: {name}"))


def wikipedia(folder: Path | None) -> Corpus:
    r"""English Wikipedia, lower case: a paragraph a line, words seen three times or more.

    Words are what \w+(?:['’]\w+)* finds, and each other character that is no space.

    The hub has all articles in one part: the first 4,200 of them are trained on and the next 128
    and 128 held out. They are not those that a folder may hold, nor are the numbers of one to be
    compared with those of the other.
    """
    if folder is None:
        texts = first_articles()
    else:
        rows = local(folder, "wikipedia", PARTS, instead(WIKIPEDIA))
        texts = columns(rows, "text", f"--data-dir {folder}: wikipedia")
    return Corpus(
        {part: list(paragraphs(texts[part])) for part in PARTS}, split=WORD.findall, fewest=3
    )


def first_articles() -> dict[str, list[str]]:
    """The texts of the hub's first articles, without the rest being loaded."""
    import datasets

    with public(WIKIPEDIA, "wikipedia", PARTS):
        rows = datasets.load_dataset(WIKIPEDIA, "20231101.en", split="train", streaming=True)
        texts = (row["text"] for row in rows)
        return {part: list(islice(texts, n)) for part, n in zip(PARTS, ARTICLES, strict=True)}


def paragraphs(texts: Iterable[str]) -> Iterable[str]:
    """The lines that are not empty, in lower case."""
    return (line for text in texts for line in text.lower().split("\n") if line.strip())


def columns(parts: Any, column: str, source: str) -> dict[str, list[str]]:
    """A column of text of every part. source: what an error calls the set."""
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


# Of the generated text: its words, the words that often follow each, how often one of those does,
# how often a sentence ends, and the words of its parts with the ends of sentences.
WORDS = 340
FOLLOWERS = 4
FOLLOWS = 0.8
ENDS = 0.1
SIZES = (6000, 1000, 1000)


def generated(folder: Path | None) -> Corpus:
    """A first-order Markov chain of 340 words w0, w1, … whose frequencies fall about as 1 / rank.

    Four words in five are one of four that follow the last word often, the others are drawn
    anew. The same on every machine: it is made of random.Random(0).random() alone, whose sequence
    Python promises to keep.
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
    "ptb": ptb,
    "wikipedia": wikipedia,
    "generated": generated,
}


def read(name: str, folder: Path | None) -> Corpus:
    """The corpus of that name, or the sentences of that name in the folder.

    folder: see `text.load`.
    Raises: LabError for an unknown set, and for one that cannot be had, saying what would do.
    """
    if name == "generated" and folder is not None:
        raise LabError("--dataset generated is made, not read; leave --data-dir out")
    corpus = found(name, chosen(folder))
    for part, lines in corpus.parts.items():
        if not lines:
            raise LabError(f"--dataset {name}: the {part} part must have words, got none")
    return corpus


def found(name: str, folder: Path | None) -> Corpus:
    """The corpus of that name; those that are not public are in the folder."""
    if name in CORPORA:
        return CORPORA[name](folder)
    known = ", ".join(CORPORA)
    if folder is None:
        raise LabError(
            f"--dataset must be one of {known}, or a set in a folder given by --data-dir, "
            f"got {name!r}"
        )
    return sentences(name, folder, f"; or give --dataset one of {known}")
