"""Which rows belong to which rank: equal numbers as `DTensor`'s `Shard(0)` has them, or any."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Owners", "RowsOfRanks", "Sharding"]


class RowsOfRanks(ABC):
    """Rows over ranks, each of which has its own in their order.

    size: the number of ranks.
    rank: this one.
    """

    size: int
    rank: int

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of rows of all ranks."""

    @property
    @abstractmethod
    def own(self) -> slice | Tensor:
        """The rows of this rank."""

    @abstractmethod
    def number_of(self, rank: int) -> int:
        """The number of rows of a rank."""

    def __len__(self) -> int:
        return self.number_of(self.rank)


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
        """The first class of a rank."""
        return min(rank * self.share, self.num_classes)

    def slice_of(self, rank: int) -> slice:
        """The classes of a rank."""
        return slice(self.start_of(rank), self.start_of(rank + 1))

    def number_of(self, rank: int) -> int:
        return self.start_of(rank + 1) - self.start_of(rank)

    @property
    def start(self) -> int:
        """The first class of this rank."""
        return self.start_of(self.rank)

    @property
    def stop(self) -> int:
        """The end of the classes of this rank."""
        return self.start_of(self.rank + 1)

    @property
    def own(self) -> slice | Tensor:
        return self.slice_of(self.rank)

    def local(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The places of classes among those of this rank, and whether they are its own.

        The place of a class of another rank is 0.
        """
        own = (classes >= self.start) & (classes < self.stop)
        return torch.where(own, classes - self.start, 0), own

    def classes_of(self, rank: int, start: int, size: int) -> slice:
        """At most `size` classes of a rank, from the one at a place among its own."""
        own = self.slice_of(rank)
        return slice(min(own.start + start, own.stop), min(own.start + start + size, own.stop))

    def named(self, places: Tensor) -> Tensor:
        """The classes at places among those of this rank."""
        return places + self.start

    @property
    def slice(self) -> slice:
        """The classes of this rank."""
        return slice(self.start, self.stop)


@dataclass(frozen=True, eq=False)
class Owners(RowsOfRanks):
    """Rows that belong to any rank.

    owner: (N) the rank of each row.
    """

    owner: Tensor
    size: int
    rank: int

    @classmethod
    def balanced(cls, loads: Tensor, size: int, rank: int) -> Owners:
        """Rows with loads (N) over ranks whose loads have about equal sums.

        Each row, the heaviest first, joins the rank with the smallest sum (Graham 1969, "Bounds on
        multiprocessing timing anomalies").

        >>> Owners.balanced(torch.tensor([1, 5, 2, 1, 2]), 2, 0).owner
        tensor([1, 0, 1, 0, 1])
        """
        owner = torch.zeros(len(loads), dtype=torch.long)
        if size == 1:
            return cls(owner, size, rank)
        heap = [(0.0, r) for r in range(size)]
        order = loads.argsort(descending=True, stable=True)
        for row, load in zip(order.tolist(), loads[order].tolist(), strict=True):
            held, r = heap[0]
            owner[row] = r
            heapq.heapreplace(heap, (held + load, r))
        return cls(owner, size, rank)

    @property
    def total(self) -> int:
        return len(self.owner)

    @property
    def own(self) -> slice | Tensor:
        return self.rows_of(self.rank)

    def rows_of(self, rank: int) -> Tensor:
        """The rows of a rank."""
        return (self.owner == rank).nonzero().squeeze(1)

    def number_of(self, rank: int) -> int:
        return int((self.owner == rank).sum())
