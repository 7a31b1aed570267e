"""The only door between losses and linear algebra.

A spherical loss sees the D outputs o of a row through three statistics, taken under a base
measure π (π = 1 in the papers) of total mass M = Σ π_k:

    s = Σ_k π_k o_k        q = Σ_k π_k o_k²        c_j = o_{t_j},  j = 1 … K targets

so that ∂ℓ/∂o_k = π_k (s' + 2 q' o_k) + Σ_j [k = t_j] c'_j  with s', q', c' the partials of ℓ.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Partials", "Stats"]


@dataclass(frozen=True)
class Stats:
    """What a spherical loss sees of a batch of rows; leading dimensions `...` are the rows.

    s, q: (...)            the sums above
    c: (..., K)            the outputs of the K targets of a row
    mass: M = Σ π_k        equal to D, since a prior is normalised to Σ π_k = D
    y: (..., K) or None    target values (None: all one); 0 marks padding. Repeated targets of a
                           row have been added up, so that Σ_j y_j² is the norm of the target
    pi: (..., K) or None   π at the targets (None: all one)
    """

    s: Tensor
    q: Tensor
    c: Tensor
    mass: float
    y: Tensor | None = None
    pi: Tensor | None = None


@dataclass(frozen=True)
class Partials:
    """∂ℓ/∂s (...), ∂ℓ/∂q (...) and ∂ℓ/∂c (..., K) of a row's loss."""

    s: Tensor
    q: Tensor
    c: Tensor
