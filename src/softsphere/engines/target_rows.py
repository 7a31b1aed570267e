"""The part of the gradient with respect to [W b] that comes from the targets.

Targets pull at rows that everything else pushes away, and late in training the two nearly cancel.
So they are added up in the dtype of the computation, and rounded to that of the weight once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softsphere._torch import values_on_cpu
from softsphere.engines import fused_rows

__all__ = ["TargetRows", "joined"]


class TargetRows(NamedTuple):
    """Σ_ij [k = t_ij] g_ij [h_i 1] for each class k.

    H: (m, d)             the hidden rows
    target: (m, K)        the target classes t_ij of each row
    gc: (m, K)            the gradients g_ij with respect to their outputs
    """

    H: Tensor
    target: Tensor
    gc: Tensor

    def add_to(self, out: Tensor, classes: slice | Tensor, *, deterministic: bool) -> None:
        """Adds the rows of some classes, without their last entry, to out (n, d).

        Args:
            out: in the dtype of gc.
            classes: the n classes, as a slice or as numbers in ascending order. If a class is
                there more than once, its first place has its row.
        """
        if isinstance(classes, slice):
            place = self.target - classes.start
            inside = (place >= 0) & (place < len(out))
        else:
            place = torch.searchsorted(classes, self.target).clamp_max(len(out) - 1)
            inside = classes[place] == self.target
        if fused_rows.usable(out):
            fused_rows.add_target_rows(out, self.H, place, self.gc.where(inside, 0))
            return
        for at, some, gc in zip(place.unbind(1), inside.unbind(1), self.gc.unbind(1), strict=True):
            H, g = self.H, gc.where(some, 0)
            if values_on_cpu(out):
                few = some.nonzero().squeeze(1)
                at, H, g = at[few], H[few], gc[few]
            # zeros go anywhere, but not all to one row
            _add_at(out, at.remainder(len(out)), g.unsqueeze(1) * H.to(g.dtype), deterministic)

    def add_to_bias(self, out: Tensor, *, deterministic: bool) -> None:
        """Adds the last entries of all rows to out (D)."""
        _add_at(out, self.target.flatten(), self.gc.flatten().to(out.dtype), deterministic)


def joined(some: list[TargetRows]) -> list[TargetRows]:
    """The same rows, in one piece for each number K of targets."""
    by_K: dict[int, list[TargetRows]] = {}
    for rows in some:
        by_K.setdefault(rows.target.shape[1], []).append(rows)
    return [TargetRows(*map(torch.cat, zip(*each, strict=True))) for each in by_K.values()]


def _add_at(out: Tensor, index: Tensor, x: Tensor, deterministic: bool) -> None:
    """out[index] += x, equal indices adding up."""
    if out.device.type == "cpu" or deterministic:
        # deterministic on a GPU, and several times as fast as index_add_ on a CPU
        out.index_put_((index,), x, accumulate=True)
    else:
        out.index_add_(0, index, x)
