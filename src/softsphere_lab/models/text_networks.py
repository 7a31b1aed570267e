"""Language models without their output layer: what they make of the words that they read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
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
    """An LSTM over windows of words.

    It takes (N, context + length) to (N, length, width), each window from a zero state, which the
    first `context` words fill. With `streams` that is so in evaluation alone: in training it takes
    (streams, length) to (streams, length, width), and begins each window with the state in which
    the last call ended.

    layers: how many LSTMs stand one upon the other, each of that width. dropout: its probability
    after the embeddings and after each layer. streams: the rows of a training batch, where their
    states are carried; 0 where they are not.
    """

    # Reads words (…) as embeddings (…, width) where another layer has them.
    read: Callable[[Tensor], Tensor] | None = None
    state: Tensor | None

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        width: int,
        layers: int = 1,
        dropout: float = 0.0,
        context: int = 0,
        streams: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding: nn.Embedding | None = nn.Embedding(vocabulary, embedding)
        between = dropout if layers > 1 else 0.0
        self.layer = nn.LSTM(embedding, width, layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        # h and c of each layer; a part of the state of training, which has to be resumed
        state = torch.zeros(2, layers, streams, width) if streams else None
        self.register_buffer("state", state)

    def tie(self, read: Callable[[Tensor], Tensor]) -> None:
        """Reads words by a function from now on, and has no embedding of its own any more."""
        self.read, self.embedding = read, None

    def words(self, x: Tensor) -> Tensor:
        """Returns the embeddings (…, embedding) of words x (…)."""
        read = self.read or self.embedding
        assert read is not None
        rows: Tensor = read(x)
        return rows

    def begin(self) -> None:
        """Begins all streams anew, with a zero state."""
        if self.state is not None:
            self.state.zero_()

    def forward(self, x: Tensor) -> Tensor:
        words = self.dropout(self.words(x))
        if self.training and self.state is not None:
            h, c = self.state.clone()  # the backward pass reads what they were
            hidden, after = self.layer(words, (h, c))
            self.state.copy_(torch.stack(after).detach())
        else:
            hidden = self.layer(words)[0][:, self.context :]
        counted: Tensor = self.dropout(hidden)
        return counted
