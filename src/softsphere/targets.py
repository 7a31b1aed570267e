"""Targets as entries of a sparse vector: classes, values, and the weight of each row."""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from softsphere import checks
from softsphere.overflow import factors

__all__ = ["PADDING", "Targets", "from_indices", "from_sparse"]

PADDING = -1


@dataclass(frozen=True)
class Targets:
    """The targets of rows, as entries of a sparse vector.

    t: (..., K) class indices.
    y: (..., K) their values, or None for one.
    ignored: (...) whether a row has no loss.
    counted: (...) the factor of the loss of a row, which is also its share in a mean; 0 if ignored.

    Padding and ignored rows have t = 0 and y = 0, so that every index can be looked up.
    """

    t: Tensor
    y: Tensor | None
    ignored: Tensor
    counted: Tensor

    def weigh(self, rows: Tensor, *, overflows: bool = True) -> Tensor:
        """The losses of the rows times their factors; 0 for ignored rows.

        overflows: whether a loss that is not finite is an overflow that nothing has marked yet.
            With softmax it may be that of a class that −∞ leaves out, whose gradient is finite.
        """
        rows = rows.masked_fill(self.ignored, 0.0)
        return rows * (factors(rows, self.counted) if overflows else self.counted)

    def part(self, rows: slice | EllipsisType) -> Targets:
        """The targets of some rows, or of all."""
        y = None if self.y is None else self.y[rows]
        return Targets(self.t[rows], y, self.ignored[rows], self.counted[rows])

    def refuse_masked(self, mask: Tensor) -> None:
        """Raises ValueError, on a CPU, for a target outside `mask`, (C) or (..., C)."""
        taken = mask.expand(*self.t.shape[:-1], mask.shape[-1]).gather(-1, self.t)
        left_out = ~taken & ~self.ignored.unsqueeze(-1)
        checks.masked_targets(left_out if self.y is None else left_out & (self.y != 0))


def from_indices(
    target: Tensor,
    num_classes: int,
    ignore_index: int | None,
    weight: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Targets:
    """Class indices (...), one per row. The factor of a row is its class weight (None: one)."""
    target = target.long()
    ignored = _equals(target, ignore_index)
    spared = "" if ignore_index is None else f" or ignore_index = {ignore_index}"
    checks.indices(target, ignored, num_classes, spared)
    t = target.masked_fill(ignored, 0)
    # gather, since indexing with a single index looks at its value, which fails inside vmap
    own = (
        torch.ones_like(t, dtype=dtype)
        if weight is None
        else weight.gather(0, t.reshape(-1)).view(t.shape)
    )
    return Targets(t.unsqueeze(-1), None, ignored, own.masked_fill(ignored, 0.0))


def from_sparse(
    target: Tensor,
    values: Tensor,
    num_classes: int,
    ignore_index: int | None,
    weight: Tensor | None = None,
) -> Targets:
    """K-sparse targets (..., K) with values, which add up where an index is repeated.

    The values are multiplied by the class weights (C). The factor of each row is one.
    """
    target = target.long()
    # A row without any targets is not an ignored row.
    ignored = _equals(target, ignore_index).all(-1) & (target.shape[-1] > 0)
    padding = (target == PADDING) | ignored.unsqueeze(-1)
    spared = f" or {PADDING} for padding"
    if ignore_index is not None:
        spared += f", or a whole row of {ignore_index}"
    checks.indices(target, padding, num_classes, spared)
    t = torch.where(padding, 0, target)
    y = torch.where(padding, 0.0, values if weight is None else values * weight[t])
    return Targets(t, _add_up(t, y, ~padding), ignored, (~ignored).to(values.dtype))


def _equals(target: Tensor, index: int | None) -> Tensor:
    if index is None:
        return torch.zeros_like(target, dtype=torch.bool)
    return target == index


def _add_up(t: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """y (..., K) with the values of equal targets t summed at their first place, 0 elsewhere."""
    K = t.shape[-1]
    # Each padding entry gets a key of its own, so that it is equal to no other.
    apart = -1 - torch.arange(K, device=t.device)
    key, order = torch.where(real, t, apart).sort(stable=True, dim=-1)
    first = torch.ones_like(key, dtype=torch.bool)
    first[..., 1:] = key[..., 1:] != key[..., :-1]
    place = first.cumsum(-1) - 1
    total = torch.zeros_like(y).scatter_add(-1, place, y.gather(-1, order))
    summed = torch.where(first, total.gather(-1, place), 0.0)
    return torch.zeros_like(y).scatter(-1, order, summed)
