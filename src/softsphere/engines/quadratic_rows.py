"""The statistics of rows from second moments, and the gradient with respect to the rows.

The formulas and their symbols are those of `moments`. On a GPU each of the two is one product and
one pass over the rows, by a kernel of `fused_rows`; elsewhere the pass is PyTorch's operations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softsphere.engines import fused_rows
from softsphere.engines.bfloat16_parts import number_of_parts
from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.moments import Moments
from softsphere.engines.products import times
from softsphere.engines.weight import add_target_rows, target_outputs
from softsphere.rounding import above_rounding

__all__ = [
    "QuadraticRows",
    "error_of_parts",
    "hidden_gradient",
    "is_lost",
    "loses_digits",
    "quadratic_statistics",
]

# The relative error of an entry of S, in eps. In every case measured it was at most 31.
_ERROR = 32
# That of an S of bfloat16 parts, which leaves out the squares of what has been rounded.
_ERROR_OF_PARTS = 2.0**-16
# The relative error of a q that is still good enough for training and for probabilities.
_TOLERANCE = 1e-3


class QuadraticRows(NamedTuple):
    """s, q (m) and c (m, K); for the backward P (m, d), first entries of S h, and μ (m)."""

    s: Tensor
    q: Tensor
    c: Tensor
    P: Tensor
    mu: Tensor


def quadratic_statistics(x: Inputs, at: Moments) -> QuadraticRows:
    """The statistics of the rows of H, in O(m d²)."""
    d, S = x.W.shape[1], at.S
    P = times(x.H, S[:d, :d])
    if x.b is not None:
        P += S[d, :d]
    sums = fused_rows.sums if fused_rows.usable(x.H) else _sums
    q, mu, size, c = sums(x, P, at)
    # Equal rows would give S = 0, as the difference of two sums of squares of this size.
    apart = 2 * (_ERROR * torch.finfo(S.dtype).eps) ** 0.5 * size
    q = above_rounding(q.clamp_min(0), apart, at.mass)
    if at.centred:
        return QuadraticRows(torch.zeros_like(q), q, c, P, mu)
    return QuadraticRows(mu * at.mass, q + mu * mu * at.mass, c + mu.unsqueeze(1), P, mu)


def _sums(x: Inputs, P: Tensor, at: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hᵀSh, μ, Σ_j |h_j r_j| with the rest r, and x_t·h at the targets: (m), (m), (m), (m, K)."""
    d, H = x.W.shape[1], x.H.to(at.S.dtype)
    size = H.abs() @ at.rest[:d].abs() + at.rest[d:].abs().sum()
    c = target_outputs(x, at.shift, H.dtype)
    # In float64, since the parts of a mean may cancel: an input that is constant, and a bias.
    wide = H.double()
    mu = _with_bias(wide, at.mean).to(H.dtype)
    c = c - _with_bias(wide, at.rest.double()).to(H.dtype).unsqueeze(1)
    return _squares(H, P, at.S), mu, size, c


def _squares(H: Tensor, P: Tensor, S: Tensor) -> Tensor:
    """hᵀSh (m) of rows h of [H 1], or of H, from P, the first entries of S h."""
    d = H.shape[1]
    if len(S) == d:
        return (P * H).sum(1)
    # not H @ S[:d, d], which would round both where float32 products need not be exact
    return ((P + S[:d, d]) * H).sum(1) + S[d, d]


def _with_bias(H: Tensor, w: Tensor) -> Tensor:
    """[H 1] w for a w (n)."""
    return H @ w[: H.shape[1]] + w[H.shape[1] :].sum()


def loses_digits(H: Tensor, P: Tensor, S: Tensor) -> Tensor:
    """Whether hᵀSh has lost too many digits in some row of H: a boolean ()."""
    error = error_of_parts(H, S.dtype)
    H, d = H.detach().to(S.dtype), H.shape[1]
    with torch.autocast(H.device.type, enabled=False):
        size = S.diagonal()
        terms = H.square() @ size[:d] + size[d:].sum()
        return is_lost(_squares(H, P, S), terms, S.dtype, error).any()


def error_of_parts(H: Tensor, dtype: torch.dtype) -> float:
    """What parts leave out of a product of H with an S in dtype, relative to √(S_ii S_jj)."""
    return _ERROR_OF_PARTS if number_of_parts(H, dtype) else 0.0


def is_lost(q: Tensor, terms: Tensor, dtype: torch.dtype, error: float = 0.0) -> Tensor:
    """Whether too few digits are left of q = hᵀSh, from terms = Σ_j h_j² S_jj: boolean, as q.

    Each entry of S is a sum with a rounding error in proportion to √(S_ii S_jj), so the error of
    q is about c eps · terms with c ≤ `_ERROR`.

    Args:
        dtype: in which the entries of S were summed.
        error: what they are off besides, relative to √(S_ii S_jj).
    """
    return (_ERROR * torch.finfo(dtype).eps + error) * terms > _TOLERANCE * q


def hidden_gradient(x: Inputs, P: Tensor, mu: Tensor, at: Moments, g: Gradients) -> Tensor:
    """∂H (m, d), in the dtype of H."""
    # the factor of w̄, and the factor of P
    of_mean = None if at.centred else at.by_output(g, mu) * at.mass + g.c.sum(1)
    add = fused_rows.hidden_gradient if fused_rows.usable(x.H) else _hidden_gradient
    return add(x, P, at, 2 * g.q, g.c, of_mean)


def _hidden_gradient(
    x: Inputs, P: Tensor, at: Moments, of_P: Tensor, gc: Tensor, of_mean: Tensor | None
) -> Tensor:
    """of_P P + Σ_j gc_j x_{t_j} + of_mean w̄."""
    d = x.W.shape[1]
    out = P * of_P.unsqueeze(1)
    add_target_rows(out, x.W, x.target, gc, at.shift)
    out.addr_(gc.sum(1), -at.rest[:d])
    if of_mean is not None:
        out.addr_(of_mean, at.mean[:d].to(out.dtype))
    return out.to(x.H.dtype)
