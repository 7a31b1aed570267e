"""The coordinates that each row of V is written in, so that U can be replaced without rewriting V.

Row k of V belongs to the generation g = made_k in which it was last written: W_k = V_k M_g U + ω,
where M_g = I for the current one. When the condition of U has grown too large, U ← P and
M_g ← M_g (U P⁻¹) for every g, and no row is read. A row is carried over, V_k ← V_k M_g, when it is
next a target. A direction that U has shrunk stays shrunk in M_g. Since V_k was rounded before
that, this loses no digit of W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softsphere.matrix.precision import Rounded, is_asynchronous, product
from softsphere.matrix.rows import Rows

__all__ = ["Generations"]

# Beyond this number, the rows of the generation that has the fewest are carried over.
_LIVE = 8
_MAPS = "maps"


class Generations:
    """The generations in which rows of V are written.

    made: (D) uint8, the generation of each row
    maps: (G, w, w) float64, M of each generation
    now: the current generation
    """

    def __init__(self, num_rows: int, width: int, device: torch.device, rounded: Rounded) -> None:
        self.made = torch.zeros(num_rows, dtype=torch.uint8, device=device)
        self.maps = torch.eye(width, dtype=torch.float64, device=device).unsqueeze(0)
        self.now = 0
        self.rounded = rounded
        # makes numbers of rows here those of all rows, where other ranks have the rest
        self.total: Callable[[Tensor], Tensor] = _alone

    @property
    def alone(self) -> bool:
        """Whether all rows are in the current generation."""
        return len(self.maps) == 1

    def maps_in(self, dtype: torch.dtype) -> Tensor:
        """Returns `maps` in the dtype of V."""
        return self.rounded.get(_MAPS, dtype, lambda: (self.maps,))

    def set(self, maps: Tensor, now: int) -> None:
        """Replaces the maps and the number of the current generation."""
        self.maps, self.now = maps, now
        self.rounded.forget(_MAPS)

    def carried(self, rows: Tensor, made: Tensor) -> Tensor:
        """Takes rows of V (n, w) of generations made (n) to the coordinates of the current one."""
        if self.alone:
            return rows
        maps = self.maps_in(rows.dtype)
        if is_asynchronous(rows.device):
            # Asking which generations occur would wait for the device.
            parts = [torch.where((made == g).unsqueeze(1), rows, 0) for g in range(len(maps))]
            out = parts[self.now]
            for g, part in enumerate(parts):
                if g != self.now:
                    out = out + product(part, maps[g])
            return out
        out = rows.clone()
        for g in made.unique().tolist():
            if g != self.now:
                index = (made == g).nonzero().squeeze(1)
                out[index] = product(rows[index], maps[g])
        return out

    def begin(self, step: Tensor) -> None:
        """Begins a generation; `step` = U P⁻¹ leads from the last coordinates to the new ones."""
        counts = self.counts()
        maps = self.maps @ step
        eye = torch.eye(step.shape[0], dtype=step.dtype, device=step.device)
        now = counts.index(0) if 0 in counts else len(counts)
        if now == len(counts):
            maps = torch.cat([maps, eye.unsqueeze(0)])
        else:
            maps[now] = eye
        # Nothing can fail from here on.
        self.set(maps, now)

    def counts(self) -> list[int]:
        """Returns the number of rows of each generation, on all ranks together."""
        each = [(self.made == g).sum() for g in range(len(self.maps))]
        return [int(count) for count in self.total(torch.stack(each)).tolist()]

    def bound(self, V: Rows) -> None:
        """Carries the rows of the smallest generation over, if there are too many generations."""
        if len(self.maps) <= _LIVE:
            return
        counts = self.counts()
        if 0 in counts[: self.now] + counts[self.now + 1 :]:
            return
        counts[self.now] = sum(counts) + 1
        least = counts.index(min(counts))
        M = self.maps_in(V.dtype)[least]
        for index in (self.made == least).nonzero().squeeze(1).split(V.chunk_size()):
            V[index] = product(V[index], M)
            self.made[index] = self.now

    def forget(self, width: int) -> None:
        """Begins with a single generation, for rows of the given width."""
        self.made.zero_()
        self.set(torch.eye(width, dtype=torch.float64, device=self.made.device).unsqueeze(0), 0)

    def widen(self, width: int) -> None:
        """Extends the maps to rows that have columns of zeros added to them."""
        old = self.maps.shape[1]
        maps = torch.eye(width, dtype=torch.float64, device=self.maps.device)
        maps = maps.repeat(len(self.maps), 1, 1)
        maps[:, :old, :old] = self.maps
        self.set(maps, self.now)

    def copied(self, device: torch.device, rounded: Rounded) -> Generations:
        """Returns a copy on a device."""
        other = Generations(0, 0, device, rounded)
        other.total = self.total
        other.made = self.made.to(device, copy=True)
        other.set(self.maps.to(device, copy=True), self.now)
        return other


def _alone(counts: Tensor) -> Tensor:
    """The numbers of rows where no other rank has any."""
    return counts
