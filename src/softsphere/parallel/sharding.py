"""Which classes belong to which rank: rows of a weight are split as `DTensor`'s `Shard(0)` does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sharding"]


@dataclass(frozen=True)
class Sharding:
    """D classes over `size` ranks, ⌈D / size⌉ for each; the last ranks may have fewer or none.

    >>> [Sharding(10, 4, rank).slice for rank in range(4)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 9, None), slice(9, 10, None)]
    """

    num_classes: int
    size: int
    rank: int

    @property
    def share(self) -> int:
        """⌈D / size⌉, the number of classes of the first rank."""
        return -(-self.num_classes // self.size)

    def start_of(self, rank: int) -> int:
        """The first class of a rank."""
        return min(rank * self.share, self.num_classes)

    @property
    def start(self) -> int:
        """The first class of this rank."""
        return self.start_of(self.rank)

    @property
    def stop(self) -> int:
        """The end of the classes of this rank."""
        return self.start_of(self.rank + 1)

    @property
    def slice(self) -> slice:
        """The classes of this rank."""
        return slice(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def local(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The places of classes among those of this rank, and whether they are its own.

        The place of a class of another rank is 0.
        """
        own = (classes >= self.start) & (classes < self.stop)
        return torch.where(own, classes - self.start, 0), own
