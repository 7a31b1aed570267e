"""The parts of a text as examples to train and test on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softsphere_lab.data.text import Text, in_streams, ngrams, windows
from softsphere_lab.errors import LabError

__all__ = [
    "MOST_NLL",
    "Examples",
    "ngram_parts",
    "perplexity",
    "rows_at_once",
    "window_parts",
]

# Inputs and targets of the parts "train", "valid" and "test".
Examples = dict[str, tuple[Tensor, Tensor]]
PARTS = ("train", "valid", "test")
# The largest negative log-likelihood whose exponential is a finite number.
MOST_NLL = 700.0
# How many words are evaluated at a time.
WORDS = 1024


def ngram_parts(text: Text, n: int, device: str) -> Examples:
    """Returns the n-grams of each part: contexts (N, n − 1) and the word after each (N)."""
    pairs = {name: ngrams(getattr(text, name), n, text.end) for name in PARTS}
    return {name: (x.to(device), y.to(device)) for name, (x, y) in pairs.items()}


def window_parts(
    text: Text, length: int, device: str, context: int = 0, streams: int = 0
) -> Examples:
    """Returns windows of each part (N, context + length) and the words to predict (N, length).

    These are the words after each of the last `length` words of a window. The first `context` words
    are the end of the window before, and of the first window ends of sentences.

    streams: how many streams the training part is read in, where that is not 0; see `in_streams`.
    Its windows (N, length) then have no words before them.
    """
    pairs = {name: windows(getattr(text, name), length, text.end) for name in PARTS}

    def preceded(x: Tensor) -> Tensor:
        padded = torch.cat([x.new_full((context,), text.end), x.flatten()])
        return padded.unfold(0, context + length, length)

    parts = {name: (preceded(x), y) for name, (x, y) in pairs.items()}
    if streams:
        x, y = pairs["train"]
        if len(x) < streams:
            raise LabError(
                f"--data-dir: {len(text.train):,} words to train on are no {streams} windows of "
                f"{length}, one of each stream; give a larger text, or another --budget"
            )
        parts["train"] = in_streams(x, streams), in_streams(y, streams)
    return {name: (x.to(device), y.to(device)) for name, (x, y) in parts.items()}


def rows_at_once(y: Tensor) -> int:
    """Returns how many rows of targets make some WORDS words, at least 1."""
    return max(1, WORDS * len(y) // y.numel())


def perplexity(nll: float) -> float:
    """Returns exp of a mean negative log-likelihood, infinity where it is too large for a float.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    return math.exp(nll) if nll < MOST_NLL else math.inf
