"""The gradient of a spherical loss by a D × d matrix W, held in O(r d) numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["StructuredGradient"]


@dataclass(frozen=True)
class StructuredGradient:
    """G = J H with J = W Lᵀ + 1 sᵀ + E, never formed: W A + 1 bᵀ + (row t_j += X_j).

    H: (r, d)              right factors, the rows that were multiplied by W
    L: (r, d)              left factors, A = Lᵀ H
    s: (r)                 b = Hᵀ s
    rows, cols, x: (n)     E has the value x_j at (rows_j, cols_j), cols in [0, r); entries at one
                           place add up. X_j = x_j H[cols_j] goes to row rows_j. cols None: 0 … r−1
    back: (r, d) or None   Jᵀ Π W, if it is known already: the gradient of what was multiplied
    at_rows: (n, d) or None   W[rows], if it is known already

    W is the matrix that the gradient was taken at, so it only makes sense with that; `back` and
    `at_rows` are what saves asking it twice. Closed under sums, scaling and right multiplication.
    """

    H: Tensor
    L: Tensor
    s: Tensor
    rows: Tensor
    cols: Tensor | None
    x: Tensor
    back: Tensor | None = None
    at_rows: Tensor | None = None

    @classmethod
    def zero(cls, width: int, like: Tensor) -> StructuredGradient:
        """The gradient with no factors, in the dtype and on the device of `like`."""
        none = torch.empty(0, dtype=torch.long, device=like.device)
        H, s = like.new_empty(0, width), like.new_empty(0)
        return cls(H, H, s, none, None, s, H, H)

    @property
    def rank(self) -> int:
        """r, the number of factors."""
        return self.H.shape[0]

    @property
    def A(self) -> Tensor:
        """(d, d)."""
        return self.L.mT @ self.H

    @property
    def b(self) -> Tensor:
        """(d)."""
        return self.H.mT @ self.s

    @property
    def X(self) -> Tensor:
        """(n, d): row j is added to row rows_j."""
        return self.x.unsqueeze(1) * (self.H if self.cols is None else self.H[self.cols])

    def columns(self) -> Tensor:
        """cols as a tensor."""
        return torch.arange(self.rank, device=self.H.device) if self.cols is None else self.cols

    def to(self, dtype: torch.dtype) -> StructuredGradient:
        """The same in another dtype."""
        if self.H.dtype == dtype:
            return self
        return replace(
            self,
            H=self.H.to(dtype),
            L=self.L.to(dtype),
            s=self.s.to(dtype),
            x=self.x.to(dtype),
            back=None if self.back is None else self.back.to(dtype),
            at_rows=None if self.at_rows is None else self.at_rows.to(dtype),
        )

    def __add__(self, other: StructuredGradient) -> StructuredGradient:
        """The sum of two gradients taken at the same W: factors side by side."""
        if self.H.shape[1] != other.H.shape[1]:
            raise ValueError(
                f"gradients must have the same width, got {self.H.shape[1]} and {other.H.shape[1]}"
            )

        def both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return None if one is None or two is None else torch.cat([one, two])

        each = self.cols is None and other.cols is None
        cols = None if each else torch.cat([self.columns(), other.columns() + self.rank])
        return StructuredGradient(
            torch.cat([self.H, other.H]),
            torch.cat([self.L, other.L]),
            torch.cat([self.s, other.s]),
            torch.cat([self.rows, other.rows]),
            cols,
            torch.cat([self.x, other.x]),
            both(self.back, other.back),
            both(self.at_rows, other.at_rows),
        )

    def __mul__(self, scale: float | Tensor) -> StructuredGradient:
        return replace(self, H=self.H * scale)

    __rmul__ = __mul__

    def __matmul__(self, P: Tensor) -> StructuredGradient:
        """G P for P (d, d): a preconditioner from the right."""
        return replace(self, H=self.H @ P)
