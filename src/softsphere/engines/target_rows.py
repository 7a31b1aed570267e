"""The part of the gradient with respect to [W b] that comes from the targets.

Targets pull at rows that everything else pushes away, and late in training the two nearly cancel.
So they are added up in the dtype of the computation, and rounded to that of the weight once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from softsphere._torch import values_on_cpu
from softsphere.engines import fused_rows
from softsphere.engines.weight import chunks
from softsphere.equal_indices import add_at

__all__ = ["TargetRows", "joined"]


@dataclass(frozen=True, eq=False)
class TargetRows:
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
        by_kernel = fused_rows.usable(out)
        if isinstance(classes, slice):
            if values_on_cpu(out) and not by_kernel:
                self._add_some(out, classes)
                return
            place = self.target - classes.start
            inside = (place >= 0) & (place < len(out))
        else:
            place = torch.searchsorted(classes, self.target).clamp_max(len(out) - 1)
            inside = classes[place] == self.target
        if by_kernel:
            fused_rows.add_target_rows(out, self.H, place, self.gc.where(inside, 0))
            return
        # the rows of other classes are zeros, which go anywhere, but not all to one place
        place, H, on_cpu = place.remainder(len(out)), self.H.to(out.dtype), _on_cpu(out)
        for at, g in zip(place.unbind(1), self.gc.where(inside, 0).unbind(1), strict=True):
            add_at(out, at, g.unsqueeze(1) * H, deterministic=deterministic or on_cpu)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The targets in ascending order, and their places in (m, K)."""
        ordered, order = self.target.flatten().sort(stable=True)
        return ordered, order

    def _add_some(self, out: Tensor, classes: slice) -> None:
        """`add_to` where Python may look at values: it reads the targets of these classes alone."""
        ordered, order = self._sorted
        ends = ordered.new_tensor([classes.start, classes.start + len(out)])
        first, last = torch.searchsorted(ordered, ends).tolist()
        m, K = self.target.shape
        for some in chunks(last - first, max(m, 1)):
            place = order[first:last][some]
            x = self.gc.flatten()[place].unsqueeze(1) * self.H[place // K].to(out.dtype)
            add_at(out, ordered[first:last][some] - classes.start, x, deterministic=True)

    def add_to_bias(self, out: Tensor, *, deterministic: bool) -> None:
        """Adds the last entries of all rows to out (D)."""
        x = self.gc.flatten().to(out.dtype)
        add_at(out, self.target.flatten(), x, deterministic=deterministic or _on_cpu(out))


def _on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, where the deterministic sums take less time."""
    return x.device.type == "cpu"


def joined(some: list[TargetRows]) -> list[TargetRows]:
    """The same rows, in one piece for each number K of targets."""
    by_K: dict[int, list[TargetRows]] = {}
    for rows in some:
        by_K.setdefault(rows.target.shape[1], []).append(rows)
    return [
        TargetRows(
            torch.cat([rows.H for rows in each]),
            torch.cat([rows.target for rows in each]),
            torch.cat([rows.gc for rows in each]),
        )
        for each in by_K.values()
    ]
