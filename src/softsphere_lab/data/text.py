"""Texts as numbers of words: the vocabulary, commonest words first, n-grams and windows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softsphere_lab.data.corpora import Corpus, read
from softsphere_lab.data.sources import digest
from softsphere_lab.errors import LabError

__all__ = ["END", "UNKNOWN", "Text", "in_streams", "load", "ngrams", "windows"]

END = "</s>"
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Text:
    """The word numbers of the three parts; words that are commoner have lower numbers.

    words: the vocabulary, the unknown word included. counts: (D) how often each word occurs in the
    training part; at least 1 for the unknown word, so that a prior made of them is positive.
    """

    words: list[str]
    counts: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor

    @property
    def end(self) -> int:
        """The number of the end of a sentence, or of the unknown word if a cut removed it."""
        return self.words.index(END if END in self.words else UNKNOWN)

    def cut(self, D: int) -> Text:
        """Returns the text in D classes: the D − 1 commonest words, and one for all others.

        The end of a sentence counts as a word. Of equally common words those with lower numbers
        stay, and the unknown word comes after them.
        Words are counted again, since a count of one may stand for a word that does not occur.
        Raises LabError unless D is from 2 to the number of words.
        """
        if not 2 <= D <= len(self.words):
            raise LabError(f"a text of {len(self.words)} words can be cut to 2 or more, got {D}")
        unknown = self.words.index(UNKNOWN)
        kept = [i for i in range(len(self.words)) if i != unknown][: D - 1]
        number = torch.full((len(self.words),), D - 1)
        number[kept] = torch.arange(D - 1)
        # Counts that were all positive stay so.
        least = self.counts.min().clamp_max(1)
        counts = number[self.train].bincount(minlength=D).to(self.counts.dtype).clamp_min(least)
        words = [*(self.words[i] for i in kept), UNKNOWN]
        # only the unknown word is out of its place
        counts, order = counts.sort(descending=True, stable=True)
        number = order.argsort()[number]
        return Text(
            [words[i] for i in order.tolist()],
            counts,
            number[self.train],
            number[self.valid],
            number[self.test],
        )

    def first(self, tokens: int) -> Text:
        """Returns the text with the first so many words to train on, and the same vocabulary.

        Words are counted again. A word that does not occur counts 1, so that all frequencies are
        positive.
        Raises LabError unless tokens is from 1 to the number of words to train on.
        """
        if not 1 <= tokens <= len(self.train):
            raise LabError(
                f"a text of {len(self.train)} words can be trained on the first 1 or more of them, "
                f"got {tokens}"
            )
        train = self.train[:tokens]
        counts = torch.bincount(train, minlength=len(self.words)).clamp_min(1)
        return replace(self, train=train, counts=counts.to(self.counts.dtype))

    def held(self, tokens: int) -> Text:
        """Returns the text with at most so many words to validate on and to test on."""
        return replace(self, valid=self.valid[:tokens], test=self.test[:tokens])

    def fingerprint(self) -> dict[str, Any]:
        """Returns what distinguishes this text from others of the same name, for a record."""
        return {
            "train": len(self.train),
            "valid": len(self.valid),
            "test": len(self.test),
            "words": len(self.words),
            "sha256": digest("\n".join(self.words).encode(), self.train, self.valid, self.test),
        }


def load(name: str, folder: Path | None = None) -> Text:
    """Returns the text of that name. Words that are too rare in its training part are <unk>.

    folder: with NAME/train.parquet, NAME/validation.parquet and NAME/test.parquet in the schema of
    the public copy, or with a column "sentence"; by default the environment variable
    SOFTSPHERE_DATA, and without it the public hub.
    Raises LabError for an unknown set and for one that cannot be read, and says what would help.
    """
    corpus = read(name, folder)
    text = text_of(corpus)
    often = text.counts >= corpus.fewest
    often[text.words.index(UNKNOWN)] = True
    seen = int(often.sum())
    if seen < 2:
        raise LabError(f"--dataset {name}: no word to train on occurs {corpus.fewest} times")
    text = text.cut(seen)
    return replace(text, counts=text.counts.clamp_min(1))


def text_of(corpus: Corpus) -> Text:
    """Returns the text with every word of its training part in the vocabulary."""
    number: defaultdict[str, int] = defaultdict(count().__next__)

    def words(part: str) -> Iterator[str]:
        for line in corpus.parts[part]:
            yield from corpus.split(line)
            yield END

    def tokens(numbers: Iterator[int]) -> Tensor:
        return torch.from_numpy(np.fromiter(numbers, dtype=np.int64))

    train = tokens(number[word] for word in words("train"))
    unknown = number[UNKNOWN]
    valid, test = (
        tokens(number.get(word, unknown) for word in words(part)) for part in ("validation", "test")
    )
    counts, order = train.bincount(minlength=len(number)).sort(descending=True, stable=True)
    rank = order.argsort()
    met = list(number)
    ordered = [met[i] for i in order.tolist()]
    return Text(ordered, counts.float(), rank[train], rank[valid], rank[test])


def ngrams(tokens: Tensor, n: int, end: int) -> tuple[Tensor, Tensor]:
    """Returns contexts (N, n − 1) and next words (N); the first context is ends of sentences."""
    padded = torch.cat([torch.full((n - 1,), end), tokens])
    return padded.unfold(0, n - 1, 1)[:-1], tokens


def windows(tokens: Tensor, length: int, end: int) -> tuple[Tensor, Tensor]:
    """Returns the words of consecutive windows (N, length) and the word after each (N, length).

    The first word read is the end of a sentence. A rest that does not fill a window is left out.
    """
    whole = len(tokens) // length * length
    before = torch.cat([torch.tensor([end]), tokens])[:whole]
    return before.view(-1, length), tokens[:whole].view(-1, length)


def in_streams(rows: Tensor, streams: int) -> Tensor:
    """Returns consecutive windows (N, …) as that many streams are read, a window of each at a time.

    A stream has ⌊N / streams⌋ consecutive windows; those that are left over are left out.

    >>> in_streams(torch.arange(7), 2)
    tensor([0, 3, 1, 4, 2, 5])
    """
    each = len(rows) // streams
    return rows[: each * streams].view(streams, each, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)
