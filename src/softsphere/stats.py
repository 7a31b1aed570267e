"""The statistics through which losses see the outputs.

A spherical loss sees the D outputs o of a row through three statistics. They are taken under a
base measure π (π = 1 in the papers) of total mass M = Σ π_k:

    s = Σ_k π_k o_k        q = Σ_k π_k o_k²        c_j = o_{t_j},  j = 1 … K targets

so that ∂ℓ/∂o_k = π_k (s' + 2 q' o_k) + Σ_j [k = t_j] c'_j, where s', q' and c' are the derivatives
of ℓ with respect to s, q and c.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Stats", "over_targets"]


@dataclass(frozen=True)
class Stats:
    """The statistics of a batch of rows. The leading dimensions `...` are the rows.

    s, q: (...)            the sums above
    c: (..., K)            the outputs of the K targets of a row
    mass: M = Σ π_k        D if all classes take part, since a prior is normalised to Σ π_k = D;
                           a tensor (...) if each row has classes of its own
    y: (..., K) or None    target values (None: all one); 0 marks padding. The values of a target
                           that is repeated in a row are already added up, so Σ_j y_j² is the
                           squared norm of the target vector
    pi: (..., K) or None   π at the targets (None: all one)
    """

    s: Tensor
    q: Tensor
    c: Tensor
    mass: float | Tensor
    y: Tensor | None = None
    pi: Tensor | None = None


def over_targets(x: Tensor, dim: int = -1) -> Tensor:
    """The sum over the targets of a row, which is without an operation where there is one."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)
