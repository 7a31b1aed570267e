"""The sums of rows h that a kept Gram matrix has lost the digits of, from their outputs.

G = Σ_k π_k (w_k − r)(w_k − r)ᵀ is kept with an error in proportion to its entries. Where h is
nearly orthogonal to a large part of W, so little is left of hᵀGh that this error is all of it. The
outputs o_k = (w_k − r)·h have no such error. With r near the mean row x̄ of W and M = Σ_k π_k,

    x̄·h = r·h + Σ_k π_k o_k / M
    hᵀGh = Σ_k π_k o_k² − (Σ_k π_k o_k)²/M
    G h = Σ_k π_k o_k (w_k − r) − (Σ_k π_k o_k)(Σ_k π_k (w_k − r))/M.

Each h costs O(D w), and all of them O(D w²) to read W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softsphere.engines.quadratic_rows import is_lost
from softsphere.matrix.abstract import Kept
from softsphere.matrix.wear import tolerance

__all__ = ["SumsOfOutputs", "lost_rows"]

# The outputs that are in memory at once.
_PAIRS = 1 << 22


def lost_rows(W: Kept, q: Tensor, terms: Tensor, error: float = 0.0) -> Tensor:
    """Whether too few digits are left of q = hᵀGh, from terms = Σ_j h_j² G_jj: boolean, as q.

    G is kept through steps, and computed again where it has drifted by more than a tolerance.

    error: that of the product with G; see `is_lost`.
    """
    return is_lost(q.detach(), terms, W.dtype, tolerance(W) + error)


class SumsOfOutputs:
    """x̄·h, hᵀGh and G h of rows H (…, n, w), as sums in float64 over pieces of W.

    The leading dimensions are matrices W of their own.

    r: (…, w) float64, about the mean row of each.
    """

    def __init__(self, H: Tensor, r: Tensor) -> None:
        self.H, self.r, self.dtype = H.double(), r.unsqueeze(-2), H.dtype
        self.q, self.o = self.H.new_zeros(2, *H.shape[:-1])
        self.P, self.x = torch.zeros_like(self.H), torch.zeros_like(self.r)

    def chunk_size(self, most: int) -> int:
        """The number of rows of W in a piece, no more than `most`."""
        return min(most, max(1, _PAIRS // self.H[..., 0].numel()))

    def add(self, rows: Tensor, pi: Tensor | None) -> None:
        """Adds rows (…, p, w) of W with their π (…, p), or None for one everywhere."""
        X = rows.double() - self.r
        o = self.H @ X.mT
        weighted = o if pi is None else o * pi.unsqueeze(-2)
        self.q += (weighted * o).sum(-1)
        self.o += weighted.sum(-1)
        self.P += weighted @ X
        self.x += X.sum(-2, keepdim=True) if pi is None else pi.double().unsqueeze(-2) @ X

    def found(
        self, mass: float | Tensor, total: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x̄·h (…, n), hᵀGh (…, n) and the rows G h (…, n, w), in the dtype of H.

        Args:
            mass: M, a number or (…, 1).
            total: makes a sum over these pieces one over all of W, if they are not all.
        """
        sums = self.q, self.o, self.P, self.x
        q, o, P, x = sums if total is None else map(total, sums)
        mean = o / mass
        mu = (self.H * self.r).sum(-1) + mean
        q = (q - o * mean).clamp_min(0)
        P = P - mean.unsqueeze(-1) * x
        return mu.to(self.dtype), q.to(self.dtype), P.to(self.dtype)
