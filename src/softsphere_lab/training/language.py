"""Language models without their output layer, and the training of one with a given layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from softsphere_lab.data.text import Text, ngrams, windows

__all__ = [
    "LSTM",
    "MOST_NLL",
    "Examples",
    "mean_loss",
    "mlp",
    "ngram_parts",
    "perplexity",
    "window_parts",
]

# Contexts and the words that follow, of each part of a text.
Examples = dict[str, tuple[Tensor, Tensor]]
PARTS = ("train", "valid", "test")
# Of which exp is still a number.
MOST_NLL = 700.0


def ngram_parts(text: Text, n: int, device: str) -> Examples:
    """n-grams: contexts (N, n − 1) and the next word of each (N)."""
    return {
        name: tuple(x.to(device) for x in ngrams(getattr(text, name), n, text.end))  # type: ignore[misc]
        for name in PARTS
    }


def window_parts(text: Text, length: int, device: str) -> Examples:
    """Windows of text (N, length) and the next word at each of their places (N, length)."""
    return {
        name: tuple(x.to(device) for x in windows(getattr(text, name), length, text.end))  # type: ignore[misc]
        for name in PARTS
    }


class Exp(nn.Module):
    """The exponential of each number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


# What follows each linear layer, given its width.
ACTIVATIONS: dict[str, Callable[[int], list[nn.Module]]] = {
    "relu": lambda _: [nn.ReLU()],
    "exp": lambda _: [Exp()],
    "batchnorm": lambda width: [nn.BatchNorm1d(width), nn.ReLU()],
}


def mlp(
    vocabulary: int,
    context: int,
    embedding: int,
    widths: Sequence[int],
    activation: str = "relu",
    dropout: float = 0.0,
) -> nn.Module:
    """Embeddings of the context side by side, and layers of those widths: (N, context) → (N, last).

    dropout: before each layer, none where it is zero.
    """
    layers: list[nn.Module] = [nn.Embedding(vocabulary, embedding), nn.Flatten()]
    for inputs, outputs in itertools.pairwise((context * embedding, *widths)):
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers += [nn.Linear(inputs, outputs), *ACTIVATIONS[activation](outputs)]
    return nn.Sequential(*layers)


class LSTM(nn.Module):
    """An LSTM over windows that each begin at rest: (N, length) → (N, length, width)."""

    def __init__(self, vocabulary: int, embedding: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.layer = nn.LSTM(embedding, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(self.embedding(x))[0]
        return hidden


def mean_loss(model: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> float:
    """Over all words of y."""
    model.eval()
    head.eval()
    total = 0.0
    size = max(1, 1024 * len(y) // y.numel())
    with torch.no_grad():
        for part, target in zip(torch.split(x, size), torch.split(y, size), strict=True):
            total += float(head(model(part), target)) * target.numel()
    return total / y.numel()


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood; infinite where that is no number of Python.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    return math.exp(nll) if nll < MOST_NLL else math.inf
