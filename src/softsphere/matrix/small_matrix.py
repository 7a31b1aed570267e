"""A small float64 matrix to which every step adds something in float32."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SmallMatrix"]

# The most increments that are summed apart. Up to here the rounding errors of the sum are about as
# large as those that the increments have themselves, as products of float32 matrices.
_MOST = 16
# S + L may shrink to this share of S, to whose size the rounding errors are in proportion.
_LEAST = 0.7


class SmallMatrix:
    """S + L: a matrix S (w, w) in float64, and the sum L of the latest increments, in float32.

    Adding float32 to float64, and rounding the sum for the next step, moves several times the
    memory that a sum in float32 does. So L is added to S only once in a while: after some
    increments, or before they have taken much of S away.

    >>> S = SmallMatrix(torch.zeros(1, 1, dtype=torch.float64))
    >>> for _ in range(3):
    ...     S.add(torch.full((1, 1), 0.5))
    >>> S.parts
    (tensor([[0.]], dtype=torch.float64), tensor([[1.5000]]))
    """

    def __init__(self, S: Tensor) -> None:
        self.S = S
        self._forget()

    def _forget(self) -> None:
        self.L: Tensor | None = None
        self.count, self.left = 0, 1.0
        self._rounded_S: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """S and, if there is one, L."""
        return (self.S,) if self.L is None else (self.S, self.L)

    @property
    def value(self) -> Tensor:
        """S + L in float64. It is S itself where there is no L."""
        return self.S if self.L is None else self.S + self.L

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of S + L in float64."""
        diagonal = self.S.diagonal()
        return diagonal if self.L is None else diagonal + self.L.diagonal()

    def rounded_parts(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(S + L) in float64, or if L has this dtype, S rounded to it and L."""
        if self.L is None or self.L.dtype != dtype:
            return (self.value,)
        if self._rounded_S is None:
            self._rounded_S = self.S.to(dtype)
        return self._rounded_S, self.L

    def add(self, increment: Tensor, share: float = 1.0) -> None:
        """Adds an increment in float32 to L. The first one becomes L, and is written later.

        share: what the increment leaves of S + L in the direction of which it takes most.
        """
        if self.L is None:
            self.L = increment
        else:
            self.L.add_(increment)
        self.count, self.left = self.count + 1, self.left * share
        if self.count == _MOST or self.left < _LEAST:
            self.settle()

    def settle(self) -> None:
        """Adds L to S."""
        if self.L is not None:
            self.S.add_(self.L)
        self._forget()

    def put(self, value: Tensor) -> None:
        """Sets the matrix to a value, in the memory of S."""
        self.S.copy_(value)
        self._forget()

    def copied(self, device: torch.device) -> SmallMatrix:
        """A copy whose sums will be rounded as those of this one."""
        other = SmallMatrix(self.S.to(device, copy=True))
        if self.L is not None:
            other.L = self.L.to(device, copy=True)
            other.count, other.left = self.count, self.left
        return other
