"""The coordinates that each row of V is written in, so that U can begin anew without rewriting V.

Row k of V belongs to the generation in which it was last written: W_k = V_k M_g U + ω, g = made_k,
with M = I for the current one. When U has worn, U ← P and M_g ← M_g (U P⁻¹) for every g: no row is
read. A row is carried over, V_k ← V_k M_g, when it is next a target. What U has shrunk is shrunk in
M_g for good, and since V_k was rounded before that, no digit of W is lost with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.matrix.precision import Rounded, product
from softsphere.matrix.rows import Rows

__all__ = ["Generations"]

# So many at most; before there are more, the rows of the one with the fewest are carried over.
LIVE = 8
MAPS = "maps"


class Generations:
    """made (D) uint8: the generation of each row; maps (G, w, w) float64: M; now: the last one."""

    def __init__(self, num_rows: int, width: int, device: torch.device, rounded: Rounded) -> None:
        self.made = torch.zeros(num_rows, dtype=torch.uint8, device=device)
        self.maps = torch.eye(width, dtype=torch.float64, device=device).unsqueeze(0)
        self.now = 0
        self.rounded = rounded

    @property
    def alone(self) -> bool:
        """Whether all rows are in the current generation."""
        return len(self.maps) == 1

    def maps_in(self, dtype: torch.dtype) -> Tensor:
        """maps in the dtype of V."""
        return self.rounded.get(MAPS, dtype, lambda: self.maps)

    def set(self, maps: Tensor, now: int) -> None:
        self.maps, self.now = maps, now
        self.rounded.forget(MAPS)

    def carried(self, rows: Tensor, made: Tensor) -> Tensor:
        """Rows of V (n, w) of the generations made (n), in the coordinates of the current one."""
        if self.alone:
            return rows
        maps = self.maps_in(rows.dtype)
        if rows.device.type != "cpu":
            # to ask which generations there are would be to wait for the device
            each = (
                product(torch.where((made == g).unsqueeze(1), rows, 0), M)
                for g, M in enumerate(maps)
            )
            return sum(each, torch.zeros_like(rows))
        out = rows.clone()
        for g in made.unique().tolist():
            if g != self.now:
                index = (made == g).nonzero().squeeze(1)
                out[index] = product(rows[index], maps[g])
        return out

    def begin(self, step: Tensor) -> None:
        """A new generation, `step` = U P⁻¹ from the coordinates of the last one to its own."""
        counts = self.counts()
        maps = self.maps @ step
        eye = torch.eye(step.shape[0], dtype=step.dtype, device=step.device)
        now = counts.index(0) if 0 in counts else len(counts)
        if now == len(counts):
            maps = torch.cat([maps, eye.unsqueeze(0)])
        else:
            maps[now] = eye
        # nothing can fail from here on
        self.set(maps, now)

    def counts(self) -> list[int]:
        """How many rows each generation has."""
        each = [(self.made == g).sum() for g in range(len(self.maps))]
        return [int(count) for count in torch.stack(each).tolist()]

    def bound(self, V: Rows) -> None:
        """Carries the rows of the smallest generation over, a chunk at a time, if there are many
        generations."""
        if len(self.maps) <= LIVE:
            return
        counts = self.counts()
        if 0 in counts[: self.now] + counts[self.now + 1 :]:
            return
        counts[self.now] = V.num_rows + 1
        least = counts.index(min(counts))
        M = self.maps_in(V.dtype)[least]
        for index in (self.made == least).nonzero().squeeze(1).split(V.chunk_size()):
            V[index] = product(V[index], M)
            self.made[index] = self.now

    def forget(self, width: int) -> None:
        """All rows, now of that width, are in the current coordinates."""
        self.made.zero_()
        self.set(torch.eye(width, dtype=torch.float64, device=self.made.device).unsqueeze(0), 0)

    def widen(self, width: int) -> None:
        """For rows that have got columns of zeros beside them."""
        old = self.maps.shape[1]
        maps = torch.eye(width, dtype=torch.float64, device=self.maps.device)
        maps = maps.repeat(len(self.maps), 1, 1)
        maps[:, :old, :old] = self.maps
        self.set(maps, self.now)

    def copied(self, device: torch.device, rounded: Rounded) -> Generations:
        """The same on another device, in memory of its own."""
        other = Generations(0, 0, device, rounded)
        other.made = self.made.to(device, copy=True)
        other.set(self.maps.to(device, copy=True), self.now)
        return other
