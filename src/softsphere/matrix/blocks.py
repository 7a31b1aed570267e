"""The map of the blocks of W that a step applies before it adds a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Blocks", "Number", "as_tensor"]

# A 0-d tensor is a number that is not known yet, as in a step that is captured and then repeated.
Number = float | Tensor


@dataclass(frozen=True)
class Blocks:
    """κ = base ⊗ I on the k blocks of W, and the multiple of the gradient added to each block.

    base: (k, k) numbers with k ≤ 2; block b becomes Σ_a block_a base[a][b]
    spread: (k) numbers; spread[b] times the gradient is added to block b
    """

    base: tuple[tuple[Number, ...], ...]
    spread: tuple[Number, ...]

    @property
    def numbers(self) -> tuple[Number, ...]:
        """Every number of both."""
        return (*self.spread, *(x for row in self.base for x in row))

    @property
    def known(self) -> bool:
        """Whether Python knows every number."""
        return not any(isinstance(x, Tensor) for x in self.numbers)

    @property
    def is_identity(self) -> bool:
        """Whether κ is known to be the identity on a single block."""
        scale = self.base[0][0]
        return len(self.base) == 1 and not isinstance(scale, Tensor) and scale == 1

    def times(self, x: Tensor, *, inverse: bool = False, left: bool = False) -> Tensor:
        """x κ for x (…, w), or with `left` κ x for x (w, …); with `inverse`, κ⁻¹ in place of κ."""
        if self.is_identity:
            return x
        if len(self.base) == 1:
            scale = self.base[0][0]
            return x / scale if inverse else x * scale
        # number by number, since a matrix would be copied to a device, which waits for it
        (a, b), (c, d) = self._inverted() if inverse else self.base
        if not left:
            b, c = c, b
        first, second = x.chunk(2, 0 if left else -1)
        halves = first * a + second * b, first * c + second * d
        return torch.cat(halves, 0 if left else -1)

    def columns(self, x: Tensor, out: Tensor) -> Tensor:
        """κ⁻¹ [x; 0; …] (w, w) for x (d, w), written into `out`."""
        if len(self.base) == 1:
            return torch.div(x, self.base[0][0], out=out)
        (a, _), (c, _) = self._inverted()
        return torch.cat([x * a, x * c], out=out)

    def _inverted(self) -> tuple[tuple[Number, ...], ...]:
        """base⁻¹ for two blocks."""
        (a, b), (c, d) = self.base
        det = a * d - b * c
        return (d / det, -b / det), (-c / det, a / det)

    def eigenbasis(self) -> tuple[tuple[float, ...], ...]:
        """Returns the rows (1 0) and e, where e base = λ e.

        Momentum only scales what is written in the second coordinate. Without two real and distinct
        λ the rows are those of the identity. So they are with numbers that are not finite, since a
        GPU refuses their step after these rows are used.
        """
        if len(self.base) == 1:
            return ((1.0,),)
        (a, b), (c, d) = (map(float, row) for row in self.base)
        under = (a - d) ** 2 / 4 + b * c
        if not 1e-12 < under < math.inf:
            return ((1.0, 0.0), (0.0, 1.0))
        half = under**0.5 if a >= d else -(under**0.5)
        return (1.0, 0.0), (c / ((d - a) / 2 - half), 1.0)

    def horizon(self, factor: float) -> int:
        """The number of steps in which κ shrinks one block `factor` times more than another."""
        if len(self.base) == 1:
            return 1 << 30
        shrinking = max(float(self.base[1][1]), 1e-3)
        return max(1, int(math.log(factor) / max(-math.log(shrinking), 1e-9)))

    def with_weight(self, rho: float) -> Blocks:
        """Returns the blocks for a gradient that contains rho times the first block as well."""
        if not rho:
            return self
        first = tuple(a + rho * b for a, b in zip(self.base[0], self.spread, strict=True))
        return replace(self, base=(first, *self.base[1:]))

    def finite(self) -> bool:
        """Whether all numbers are finite, as far as Python knows them."""
        return all(isinstance(x, Tensor) or math.isfinite(x) for x in self.numbers)

    def invertible(self) -> bool:
        """Whether κ has an inverse, as far as Python knows it."""
        if not self.known:
            return True
        if len(self.base) == 1:
            return float(self.base[0][0]) != 0
        (a, b), (c, d) = (map(float, row) for row in self.base)
        return abs(a * d - b * c) > 1e-12 * max(abs(a * d), abs(b * c), 1e-300)


def as_tensor(x: Number, like: Tensor) -> Tensor:
    """Returns a number as a 0-d tensor in the dtype and on the device of another tensor."""
    if isinstance(x, Tensor):
        return x.to(like.device, like.dtype)
    return torch.full((), x, dtype=like.dtype, device=like.device)
