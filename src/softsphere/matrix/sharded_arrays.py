"""The arrays of a factored matrix whose rows are sharded over the ranks of a process group.

V, π and the generations are those of the rows of this rank. U, U⁻¹, ω, G and w̄ are the same on all
ranks, bit for bit: every rank computes them from the same gradient by the same operations. What a
step reads of rows at the targets comes from the ranks that own them, and each number of it from one
rank alone, so that no rounding depends on an order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.matrix.arrays import Arrays
from softsphere.matrix.rows import Rows
from softsphere.parallel import Shards

__all__ = ["ShardedArrays", "arrays_of", "small_bits"]


def arrays_of(V: Rows, pi: Tensor | None, shards: Shards | None) -> Arrays:
    """The arrays of a matrix, of all rows or of those of this rank."""
    return Arrays(V, pi) if shards is None else ShardedArrays(V, pi, shards=shards)


class ShardedArrays(Arrays):
    """`Arrays` of the rows of one rank. All ranks must read and change them in the same order."""

    shards: Shards

    def __init__(
        self, V: Rows, pi: Tensor | None = None, width: int | None = None, *, shards: Shards
    ) -> None:
        self.shards = shards
        super().__init__(V, pi, width)
        self.generations.total = shards.ranks.sum

    @property
    def all_rows(self) -> int:
        return self.shards.sharding.num_classes

    def like(self, V: Rows, pi: Tensor | None) -> Arrays:
        return ShardedArrays(V, pi, self.width, shards=self.shards)

    def target_coordinates(self, targets: Tensor) -> Tensor:
        place, own = self.shards.sharding.local(targets)
        if self.num_rows:
            rows = torch.where(own.unsqueeze(1), self.coordinates(place), 0)
        else:
            rows = torch.zeros(len(targets), self.V.width, dtype=self.dtype, device=self.device)
        return self._from_owners(rows)

    def target_pi(self, targets: Tensor) -> Tensor | None:
        if self.pi is None:
            return None
        place, own = self.shards.sharding.local(targets)
        found = self.pi[place] if self.num_rows else self.pi.new_zeros(targets.shape)
        return self._from_owners(torch.where(own, found, 0))

    def own_targets(self, targets: Tensor) -> tuple[Tensor, Tensor | slice]:
        place, own = self.shards.sharding.local(targets)
        which = own.nonzero().squeeze(1)
        return place[which], which

    def total(self, x: Tensor) -> Tensor:
        return self.shards.ranks.sum(x)

    def near_mean(self) -> Tensor:
        """See `Arrays.near_mean`. It is that of the first rank, which has at least one row."""
        first = self.shards.ranks.rank == 0
        none = torch.zeros_like(self.omega, dtype=self.dtype)
        return self._from_owners(super().near_mean() if first else none)

    def _from_owners(self, x: Tensor) -> Tensor:
        """The sum over the ranks of numbers that are zero on all ranks but one."""
        return self.shards.ranks.reduce(x) if x.numel() else x


def small_bits(W: Arrays) -> list[int]:
    """Numbers for the bits of U, U⁻¹ and ω, which tell whether ranks have the same."""
    small = [*W.matrix("U").parts, *W.matrix("U_inv").parts, W.omega]
    sums = torch.stack([x.contiguous().view(torch.int32).sum() for x in small])
    return [int(x) for x in sums.tolist()]
