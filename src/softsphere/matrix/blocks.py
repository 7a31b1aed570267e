"""What a step does to W beside adding a gradient, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Blocks"]


@dataclass(frozen=True)
class Blocks:
    """κ = base ⊗ I on the k blocks of W, and how the gradient is spread over them."""

    base: tuple[tuple[float, ...], ...]
    spread: tuple[float, ...]

    def times(self, x: Tensor, *, inverse: bool = False, left: bool = False) -> Tensor:
        """x κ for x (…, w), or κ x for x (w, …); with κ⁻¹ where inverse."""
        if len(self.base) == 1:
            scale = self.base[0][0]
            return x if scale == 1 else x / scale if inverse else x * scale
        base = torch.tensor(self.base, dtype=x.dtype, device=x.device)
        if inverse:
            base = torch.linalg.inv_ex(base).inverse
        if left:
            return torch.einsum("ab,bdz->adz", base, x.unflatten(0, (len(base), -1))).flatten(0, 1)
        return torch.einsum("...ad,ab->...bd", x.unflatten(-1, (len(base), -1)), base).flatten(-2)

    def columns(self, x: Tensor) -> Tensor:
        """κ⁻¹ [x; 0; …] for x (d, w): (w, w)."""
        if len(self.base) == 1:
            return x if self.base[0][0] == 1 else x / self.base[0][0]
        (a, b), (c, d) = self.base
        det = a * d - b * c
        return torch.cat([x * (d / det), x * (-c / det)])

    def eigenbasis(self) -> tuple[tuple[float, ...], ...]:
        """Rows (1 0) and e with e base = λ e: what momentum only scales is written in the second.

        The identity where there are no two real and distinct λ.
        """
        if len(self.base) == 1:
            return ((1.0,),)
        (a, b), (c, d) = self.base
        under = (a - d) ** 2 / 4 + b * c
        if under <= 1e-12:
            return ((1.0, 0.0), (0.0, 1.0))
        half = under**0.5 if a >= d else -(under**0.5)
        return (1.0, 0.0), (c / ((d - a) / 2 - half), 1.0)

    def horizon(self, factor: float) -> int:
        """After how many steps κ alone has shrunk something `factor` times against the rest."""
        if len(self.base) == 1:
            return 1 << 30
        shrinking = max(self.base[1][1], 1e-3)
        return max(1, int(math.log(factor) / max(-math.log(shrinking), 1e-9)))

    def with_weight(self, rho: float) -> Blocks:
        """The same for a gradient that also has rho times the first block in it."""
        if not rho:
            return self
        first = tuple(a + rho * b for a, b in zip(self.base[0], self.spread, strict=True))
        return replace(self, base=(first, *self.base[1:]))

    def finite(self) -> bool:
        """Whether all that is multiplied by is a number."""
        return all(map(math.isfinite, (*self.spread, *(x for row in self.base for x in row))))

    def invertible(self) -> bool:
        """Whether κ has an inverse."""
        if len(self.base) == 1:
            return self.base[0][0] != 0
        (a, b), (c, d) = self.base
        return abs(a * d - b * c) > 1e-12 * max(abs(a * d), abs(b * c), 1e-300)
