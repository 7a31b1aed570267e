r"""The second moments of the rows of [W b], and what statistics and gradients they give.

With x_k the rows of [W b] less a shift, h the rows of [H 1], and

    S = Σ_k π_k x_k x_kᵀ        r = Σ_k π_k x_k

s = r·h, q = hᵀSh, c = x_t·h. Backwards, with A = Σ_i g_q h hᵀ and v = Σ_i g_s h,

    ∂h = g_s r + 2 g_q S h + Σ_j g_c x_{t_j}
    ∂x_k = π_k (v + 2 A x_k) + Σ_ij [k = t_ij] g_c h_i

Centred, the shift is the mean of the rows to rounding, so that S sums what has no large common
part, and the rest of the mean, λ = r/M, is taken off by algebra: S − r rᵀ/M, c − λ·h, v − 2 A λ,
with g_s = −Σ_j g_c / M. The blocks of W and of b are kept apart: [W b] and [H 1] are never made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.products import multiplies, product, rounded
from softsphere.engines.row_statistics import above_rounding
from softsphere.engines.weight import (
    add_target_rows,
    chunks,
    mean_row,
    read,
    target_outputs,
)

__all__ = [
    "Moments",
    "dense_gradient",
    "hidden_gradient",
    "moments",
    "quadratic_statistics",
    "small_gradient",
]

# Columns of a block of a symmetric product, of which only the upper blocks are formed.
BLOCK = 256


class Moments(NamedTuple):
    """S (n, n), r (n), the shift (n) or None for zero, and M; n = d, or d + 1 with a b."""

    S: Tensor
    r: Tensor
    shift: Tensor | None
    mass: float | Tensor


def moments(x: Inputs, centred: bool, size: int, dtype: torch.dtype) -> Moments:
    """Sums of `size` rows in dtype, and sums of those in float64; 2 D d² FLOPs, or D d² + D d."""
    _, W, b, _, pi = x
    d, mass = W.shape[1], x.mass
    n = d + (b is not None)
    shift = mean_row(x, size, dtype) if centred else None
    S, r = W.new_zeros(n, n, dtype=torch.float64), W.new_zeros(n, dtype=torch.float64)
    as_is = shift is None and pi is None and multiplies(W, dtype)
    for part in chunks(len(W), size):
        w, w1 = read(W, b, part, shift, dtype)
        weight = None if pi is None else pi[part].to(dtype)
        y = w if weight is None else w * weight.unsqueeze(1)
        factors = (W[part], W[part]) if as_is else (w, y)
        S[:d, :d] += upper_product(*factors, dtype)
        r[:d] += y.sum(0)
        if w1 is not None:
            y1 = w1 if weight is None else w1 * weight
            S[:d, d] += w1 @ y
            S[d, d] += w1 @ y1
            r[d] += y1.sum()
    S = symmetric(S)
    if centred:
        S = S - torch.outer(r, r / mass)
    return Moments(S.to(dtype), r.to(dtype), shift, mass)


def upper_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper triangle of xᵀy, at least, where that is symmetric."""
    d = x.shape[1]
    if d < 2 * BLOCK:
        return product(x.mT, y, dtype)
    out = x.new_zeros(d, d, dtype=dtype)
    for part in chunks(d, BLOCK):
        upper = out[part, part.start :]
        product(x[:, part].mT, y[:, part.start :], dtype, out=upper)
    return out


def symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).mT


def quadratic_statistics(
    H: Tensor, W: Tensor, b: Tensor | None, target: Tensor, at: Moments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, q (m), c (m, K) and P (m, d), the rows S h without their last entry where there is a b."""
    d, H = W.shape[1], H.to(at.S.dtype)
    P = H @ at.S[:d, :d]
    s, q = H @ at.r[:d], (P * H).sum(1)
    if b is not None:
        P = P + at.S[d, :d]
        q = q + 2 * (H @ at.S[:d, d]) + at.S[d, d]
        s = s + at.r[d]
    q = q.clamp_min(0)
    c = target_outputs(H, W, b, target, at.shift)
    if at.shift is None:
        return s, q, c, P
    size = H.abs() @ at.shift[:d].abs() + at.shift[d:].abs().sum()
    q = above_rounding(q, size.unsqueeze(1), len(W))
    return torch.zeros_like(s), q, c - s.unsqueeze(1) / at.mass, P


def by_sum(g: Gradients, at: Moments) -> Tensor:
    """g_s; centred, what c − μ gives the outputs of all classes."""
    return g.s if at.shift is None else -g.c.sum(1) / at.mass


def hidden_gradient(W: Tensor, target: Tensor, P: Tensor, at: Moments, g: Gradients) -> Tensor:
    """∂H (m, d)."""
    common = torch.outer(by_sum(g, at), at.r[: W.shape[1]])
    out = common.addcmul_(P, 2 * g.q.unsqueeze(1))
    add_target_rows(out, W, target, g.c, at.shift)
    return out


def small_gradient(H: Tensor, at: Moments, g: Gradients) -> tuple[Tensor, Tensor]:
    """A (n, n) and v (n): all there is of the gradient by [W b] but the rows of the targets."""
    d, n, H = H.shape[1], len(at.r), H.to(at.r.dtype)
    s = by_sum(g, at)
    A, v = at.r.new_zeros(n, n), at.r.new_zeros(n)
    A[:d, :d] = symmetric(upper_product(H, H * g.q.unsqueeze(1), H.dtype))
    v[:d] = s @ H
    if n > d:
        A[:d, d] = A[d, :d] = g.q @ H
        A[d, d], v[d] = g.q.sum(), s.sum()
    if at.shift is not None:
        v = v - 2 * (A @ at.r) / at.mass
    return A, v


def dense_gradient(
    W: Tensor,
    b: Tensor | None,
    pi: Tensor | None,
    shift: Tensor | None,
    small: tuple[Tensor, Tensor],
    out: tuple[Tensor | None, Tensor | None],
    size: int,
    *,
    fresh: bool,
) -> None:
    """Adds π_k (v + 2 A x_k) to the gradients by W and b, either None.

    fresh: that by W holds nothing yet and is written over.
    """
    A, v = small
    d, twice = W.shape[1], 2 * A
    as_is = shift is None and multiplies(W, A.dtype)
    low, scale = rounded(twice[:d, :d], W.dtype) if as_is else (twice[:d, :d], None)
    for part in chunks(len(W), size):
        x, x1 = read(W, b, part, shift, A.dtype)
        weight = None if pi is None else pi[part].to(A.dtype)
        if out[0] is not None:
            rows = out[0][part]
            direct = fresh and rows.dtype == A.dtype
            if scale is not None:
                G = torch.addcmul(v[:d], product(W[part], low, A.dtype), scale)
            else:
                G = torch.addmm(v[:d], x, low, out=rows if direct else None)
            if x1 is not None:
                G.addr_(x1, twice[d, :d])
            if weight is not None:
                G.mul_(weight.unsqueeze(1))
            if not direct:
                rows.copy_(G) if fresh else rows.add_(G)
        if out[1] is not None and x1 is not None:
            column = x @ twice[:d, d] + twice[d, d] * x1 + v[d]
            column = column if weight is None else column * weight
            out[1][part].add_(column)
