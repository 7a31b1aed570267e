"""Networks that make a hidden state from the items that a user is known to like."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ItemAverage"]

# Embeddings begin this small, as those of words do.
STD = 0.1


def item_embedding(num_items: int, width: int) -> nn.Embedding:
    """Returns embeddings with their initial values."""
    made = nn.Embedding(num_items, width)
    nn.init.normal_(made.weight, std=STD)
    return made


class ItemAverage(nn.Module):
    """The direction of the sum of a user's item embeddings, as a vector of a given length.

    embedding: takes items (N) to their embeddings (N, d). length: of the hidden state, before
    dropout. Without any item the hidden state is zero.
    """

    def __init__(
        self, embedding: Callable[[Tensor], Tensor], length: float, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.length, self.dropout = length, nn.Dropout(dropout)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Returns the hidden states (m, d) of users with these items.

        items: (N), user by user. lengths: (m) how many of them each user has.
        """
        each = self.embedding(items)
        place = torch.repeat_interleave(lengths)
        total = each.new_zeros(len(lengths), each.shape[1]).index_add(0, place, each)
        hidden: Tensor = self.dropout(self.length * F.normalize(total, dim=1))
        return hidden


def lists_padded(place: Tensor, items: Tensor, users: int) -> Tensor:
    """Returns lists of items as a table (m, K) padded with −1.

    place: (N) the row of each item, in ascending order.

    >>> lists_padded(torch.tensor([0, 2, 2]), torch.tensor([5, 7, 6]), 3)
    tensor([[ 5, -1],
            [-1, -1],
            [ 7,  6]])
    """
    lengths = torch.bincount(place, minlength=users)
    column = torch.arange(len(items), device=items.device) - (lengths.cumsum(0) - lengths)[place]
    widest = int(lengths.max()) if users else 0
    table = items.new_full((users, widest), -1)
    table[place, column] = items
    return table
