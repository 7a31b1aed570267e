"""Language models without their output layer: what they make of the words that they read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "LSTM", "ngram_network"]


class _Exp(nn.Module):
    """The exponential of each element."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


# The layers that follow each linear layer, given its width.
ACTIVATIONS: Mapping[str, Callable[[int], list[nn.Module]]] = {
    "relu": lambda _: [nn.ReLU()],
    "exp": lambda _: [_Exp()],
    "batchnorm": lambda width: [nn.BatchNorm1d(width), nn.ReLU()],
}


def ngram_network(
    vocabulary: int,
    context: int,
    embedding: int,
    widths: Sequence[int],
    activation: str = "relu",
    dropout: float = 0.0,
    linear_last: bool = False,
) -> nn.Sequential:
    """Returns embeddings of the context side by side, followed by linear layers of those widths.

    The network takes word numbers (N, context) to hidden rows (N, widths[-1]).

    activation: a key of ACTIVATIONS. dropout: its probability before each linear layer.
    linear_last: whether no activation follows the last of them.
    """
    layers: list[nn.Module] = [nn.Embedding(vocabulary, embedding), nn.Flatten()]
    for inputs, outputs in itertools.pairwise((context * embedding, *widths)):
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers += [nn.Linear(inputs, outputs), *ACTIVATIONS[activation](outputs)]
    if linear_last:
        while not isinstance(layers[-1], nn.Linear):
            layers.pop()
    return nn.Sequential(*layers)


class LSTM(nn.Module):
    """An LSTM over windows of words, each from a zero state.

    It takes (N, context + length) to (N, length, width): the first `context` words fill its state.

    layers: how many LSTMs stand one upon the other, each of that width. dropout: its probability
    after the embeddings and after each layer.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        width: int,
        layers: int = 1,
        dropout: float = 0.0,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, embedding)
        between = dropout if layers > 1 else 0.0
        self.layer = nn.LSTM(embedding, width, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(self.dropout(self.embedding(x)))[0]
        counted: Tensor = self.dropout(hidden[:, self.context :])
        return counted
