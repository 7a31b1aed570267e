"""The rows of one batch on all ranks: each rank has some of them, or all have the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.parallel.ranks import Ranks

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """How many rows each rank has.

    ranks: the ranks.
    counts: the number of rows of each rank.
    replicated: whether all ranks have the same rows, which then count once.
    """

    ranks: Ranks
    counts: tuple[int, ...]
    replicated: bool = False

    @property
    def own(self) -> slice:
        """The rows of this rank among those of all."""
        if self.replicated:
            return slice(0, self.counts[0])
        start = sum(self.counts[: self.ranks.rank])
        return slice(start, start + self.counts[self.ranks.rank])

    def gathered(self, x: Tensor) -> Tensor:
        """The rows of all ranks, from those of this one (m, …)."""
        if self.replicated:
            return x.detach().clone()
        parts = self.ranks.gather(self._padded(x))
        return torch.cat([part[:m] for part, m in zip(parts, self.counts, strict=True)])

    def scattered(self, x: Tensor) -> Tensor:
        """The sum over ranks of x (Σ m, …), at the rows of this rank."""
        if self.replicated:
            return self.ranks.sum(x)
        return self._exchanged(x).sum(0)[: self.counts[self.ranks.rank]]

    def sent(self, x: Tensor) -> Tensor:
        """What each rank found for the rows of this one, from its x (Σ m, …): (size, m, …)."""
        if self.replicated:
            return self.ranks.gather(x)
        return self._exchanged(x)[:, : self.counts[self.ranks.rank]]

    def returned(self, x: Tensor) -> Tensor:
        """The derivative of `sent`: from x (size, m, …), with a part for each rank, (Σ m, …)."""
        if self.replicated:
            return x[self.ranks.rank].clone()
        padded = x.new_zeros(len(x), max(self.counts), *x.shape[2:])
        padded[:, : x.shape[1]] = x.detach()
        parts = self.ranks.exchange(padded)
        return torch.cat([part[:m] for part, m in zip(parts, self.counts, strict=True)])

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, or x itself where all have the same rows."""
        return x.detach().clone() if self.replicated else self.ranks.sum(x)

    def _exchanged(self, x: Tensor) -> Tensor:
        parts = torch.stack([self._padded(part) for part in x.detach().split(self.counts)])
        return self.ranks.exchange(parts)

    def _padded(self, x: Tensor) -> Tensor:
        """Rows (m, …), and zeros up to the largest number of rows that a rank has."""
        out = x.new_zeros(max(self.counts), *x.shape[1:])
        out[: len(x)] = x.detach()
        return out
