"""The gradient of a spherical loss with respect to a D × d matrix W, kept in O(r d) numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import copies
from softsphere.equal_indices import Places

__all__ = ["GradientFactors"]

_ARRAYS = ("H", "L", "s", "rows", "cols", "x", "centred_back", "at_rows", "cluster")


@dataclass(frozen=True)
class GradientFactors:
    """G = ρ W + J H with J = W Lᵀ + 1 sᵀ + E, never formed.

    J H = W A + 1 bᵀ + (X_j added to row t_j).

    H: (r, d)              right factors, the rows that were multiplied by W
    L: (r, d)              left factors, A = Lᵀ H
    s: (r)                 b = Hᵀ s
    rows, cols, x: (n)     E has the value x_j at (rows_j, cols_j), cols in [0, r); entries at one
                           place add up. X_j = x_j H[cols_j] goes to row rows_j. cols None: 0 … r−1
    centred_back: (r, d) or None   J_cᵀ Π W_c if it is known, where J_c and W_c are J and W with
                           their mean rows under π taken off
    at_rows: (n, d) or None   W_c[rows] if it is known
    rho: ρ                 a multiple of W itself, as weight decay adds it
    cluster: (r) or None   the matrix of a stack whose rows W_c take the place of W for each factor;
                           column i of J is then zero at the rows of all others

    W is the matrix that the gradient was taken at, so the factors mean something only beside it.
    `centred_back` and `at_rows` save computing the same again for the step. The form is closed
    under sums, scaling and multiplication from the right.
    """

    H: Tensor
    L: Tensor
    s: Tensor
    rows: Tensor
    cols: Tensor | None
    x: Tensor
    centred_back: Tensor | None = None
    at_rows: Tensor | None = None
    rho: float = 0.0
    cluster: Tensor | None = None

    @classmethod
    def zero(cls, width: int, like: Tensor) -> GradientFactors:
        """Returns a gradient that is zero, in the dtype and on the device of `like`."""
        none = torch.empty(0, dtype=torch.long, device=like.device)
        H, s = like.new_empty(0, width), like.new_empty(0)
        return cls(H, H, s, none, None, s, H, H)

    @property
    def rank(self) -> int:
        """The number r of factors."""
        return self.H.shape[0]

    @property
    def A(self) -> Tensor:
        """Lᵀ H (d, d)."""
        return self.L.mT @ self.H

    @property
    def b(self) -> Tensor:
        """Hᵀ s (d)."""
        return self.H.mT @ self.s

    @property
    def X(self) -> Tensor:
        """(n, d), of which row j is added to row rows_j of the gradient."""
        return self.x.unsqueeze(1) * (self.H if self.cols is None else self.H[self.cols])

    @cached_property
    def places(self) -> Places:
        """The places of equal ones of `rows`."""
        return Places.of(self.rows)

    def columns(self) -> Tensor:
        """Returns `cols` as a tensor."""
        return torch.arange(self.rank, device=self.H.device) if self.cols is None else self.cols

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> GradientFactors:
        """Returns the gradient in a dtype and on a device."""
        if self.H.dtype == dtype and device in (None, self.H.device):
            return self
        given = {name: getattr(self, name) for name in _ARRAYS}
        arrays: dict[str, Any] = {name: x for name, x in given.items() if x is not None}
        if device is not None:
            arrays = {name: x.to(device) for name, x in arrays.items()}
        if dtype != self.H.dtype:
            floats = [name for name, x in arrays.items() if x.is_floating_point()]
            wide = copies([arrays[name] for name in floats], dtype)
            arrays |= zip(floats, wide, strict=True)
        return replace(self, **arrays)

    def __add__(self, other: GradientFactors) -> GradientFactors:
        """The sum of two gradients taken at the same W, with their factors side by side."""
        if self.H.shape[1] != other.H.shape[1]:
            raise ValueError(
                f"gradients must have the same width, got {self.H.shape[1]} and {other.H.shape[1]}"
            )

        def both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return None if one is None or two is None else torch.cat([one, two])

        each = self.cols is None and other.cols is None
        cols = None if each else torch.cat([self.columns(), other.columns() + self.rank])
        return GradientFactors(
            torch.cat([self.H, other.H]),
            torch.cat([self.L, other.L]),
            torch.cat([self.s, other.s]),
            torch.cat([self.rows, other.rows]),
            cols,
            torch.cat([self.x, other.x]),
            both(self.centred_back, other.centred_back),
            both(self.at_rows, other.at_rows),
            self.rho + other.rho,
            both(self.cluster, other.cluster),
        )

    def is_finite(self) -> Tensor:
        """Whether every factor is finite: a boolean tensor without dimensions."""
        total = sum((part.sum() for part in (self.H, self.L, self.s, self.x)), self.s.new_zeros(()))
        return total.isfinite()

    def __mul__(self, scale: float | Tensor) -> GradientFactors:
        rho = self.rho * float(scale) if self.rho else 0.0
        return replace(self, H=self.H * scale, rho=rho)

    __rmul__ = __mul__

    def __matmul__(self, P: Tensor) -> GradientFactors:
        """G P for a preconditioner P (d, d). G must not contain a multiple of W."""
        assert not self.rho
        return replace(self, H=self.H @ P)
