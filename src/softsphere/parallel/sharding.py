"""Which rows belong to which rank: equal numbers as `DTensor`'s `Shard(0)` has them, or others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cuts", "RowsOfRanks", "Sharding"]


class RowsOfRanks(ABC):
    """Rows over ranks: those of rank 0 come first, then those of rank 1, and so on.

    size: the number of ranks.
    rank: this one.
    """

    size: int
    rank: int

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of rows of all ranks."""

    @abstractmethod
    def start_of(self, rank: int) -> int:
        """The first row of a rank."""

    def slice_of(self, rank: int) -> slice:
        """The rows of a rank."""
        return slice(self.start_of(rank), self.start_of(rank + 1))

    def number_of(self, rank: int) -> int:
        """The number of rows of a rank."""
        return self.start_of(rank + 1) - self.start_of(rank)

    @property
    def start(self) -> int:
        """The first row of this rank."""
        return self.start_of(self.rank)

    @property
    def stop(self) -> int:
        """The end of the rows of this rank."""
        return self.start_of(self.rank + 1)

    @property
    def slice(self) -> slice:
        """The rows of this rank."""
        return slice(self.start, self.stop)

    def __len__(self) -> int:
        return self.number_of(self.rank)

    def local(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The places of rows among those of this rank, and whether they are its own.

        The place of a row of another rank is 0.
        """
        own = (rows >= self.start) & (rows < self.stop)
        return torch.where(own, rows - self.start, 0), own


@dataclass(frozen=True)
class Sharding(RowsOfRanks):
    """D classes over `size` ranks, ⌈D / size⌉ for each; the last ranks may have fewer or none.

    >>> [Sharding(10, 4, rank).slice for rank in range(4)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 9, None), slice(9, 10, None)]
    """

    num_classes: int
    size: int
    rank: int

    @property
    def total(self) -> int:
        return self.num_classes

    @property
    def share(self) -> int:
        """⌈D / size⌉, the number of classes of the first rank."""
        return -(-self.num_classes // self.size)

    def start_of(self, rank: int) -> int:
        return min(rank * self.share, self.num_classes)

    def classes_of(self, rank: int, start: int, size: int) -> slice:
        """At most `size` classes of a rank, from the one at a place among its own."""
        own = self.slice_of(rank)
        return slice(min(own.start + start, own.stop), min(own.start + start + size, own.stop))

    def named(self, places: Tensor) -> Tensor:
        """The classes at places among those of this rank."""
        return places + self.start


@dataclass(frozen=True)
class Cuts(RowsOfRanks):
    """Any number of rows for each rank.

    starts: the first row of each rank, and the number of all rows.

    >>> Cuts((0, 5, 5, 7), 2).slice
    slice(5, 7, None)
    """

    starts: tuple[int, ...]
    rank: int

    @classmethod
    def balanced(cls, loads: Tensor, size: int, rank: int) -> Cuts:
        """Rows with loads (n), none of them negative, over ranks with about equal sums.

        A row belongs to the rank in whose share of the total the middle of its load lies. No rank
        has more than its share and the largest load.

        >>> Cuts.balanced(torch.tensor([4.0, 1.0, 1.0, 2.0]), 2, 0).starts
        (0, 1, 4)
        """
        loads = loads.double()
        before = loads.cumsum(0) - loads
        owner = ((before + loads / 2) * (size / loads.sum().clamp_min(1e-300))).floor()
        starts = [int((owner < r).sum()) for r in range(size)]
        return cls((*starts, len(loads)), rank)

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.starts) - 1

    @property
    def total(self) -> int:
        return self.starts[-1]

    def start_of(self, rank: int) -> int:
        return self.starts[rank]
