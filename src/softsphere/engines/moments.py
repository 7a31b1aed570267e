r"""The second moments of the rows of [W b], and what statistics and gradients they give.

Let w̄ = Σ_k π_k [W b]_k / M be the mean row, x_k = [W b]_k − w̄ the rows without it, h a row of
[H 1], and

    S = Σ_k π_k x_k x_kᵀ        μ = w̄·h,

so that o_k − μ = x_k·h and Σ_k π_k (o_k − μ)² = hᵀ S h. The mean row is always taken off: if rows
have a large common part, WᵀW holds its square, and the digits of everything else are lost beside
it. The statistics are

    s = M μ        q = hᵀSh + M μ²        c_j = x_{t_j}·h + μ,

and centred, which are the statistics of o − μ,

    s = 0          q = hᵀSh               c_j = x_{t_j}·h.

Backward, with a = g_s + 2 g_q μ, or a = −Σ_j g_c / M if centred, A = Σ_i g_q h hᵀ and v = Σ_i a h,

    ∂h = 2 g_q S h + Σ_j g_c x_{t_j} + (M a + Σ_j g_c) w̄
    ∂[W b]_k = π_k (v + 2 A x_k) + Σ_ij [k = t_ij] g_c h_i.

The rows are read in chunks, as W − shift with a shift that is w̄ rounded to their dtype; what the
shift leaves, rest = w̄ − shift, is taken off by algebra. Half-precision rows that are multiplied as
they are have the shift 0. The blocks of W and of b are kept apart: [W b] and [H 1] are never made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.products import multiplies, product, rounded
from softsphere.engines.weight import (
    add_target_rows,
    chunk_room,
    chunks,
    mean_row,
    read,
    target_outputs,
)
from softsphere.rounding import above_rounding

__all__ = [
    "Moments",
    "QuadraticRows",
    "dense_gradient",
    "hidden_gradient",
    "loses_digits",
    "moments",
    "quadratic_statistics",
    "small_gradient",
    "upper_product",
]

# Columns of a block of a symmetric product. Only the blocks on and above the diagonal are computed.
_BLOCK = 256
# Rows whose mean is the shift.
_SAMPLE = 1024
# The relative error of an entry of S, in eps. In every case measured it was at most 31.
_ERROR = 32
# The relative error of a q that is still good enough for training and for probabilities.
_TOLERANCE = 1e-3


class Moments(NamedTuple):
    """S (n, n), shift (n), rest (n) and M, and whether statistics are to be centred.

    n = d, or d + 1 with a b. The mean row is shift + rest.
    """

    S: Tensor
    shift: Tensor
    rest: Tensor
    mass: float | Tensor
    centred: bool

    @property
    def mean(self) -> Tensor:
        """w̄ in float64."""
        return self.shift.double() + self.rest.double()


class QuadraticRows(NamedTuple):
    """s, q (m) and c (m, K); for the backward P (m, d), first entries of S h, and μ (m)."""

    s: Tensor
    q: Tensor
    c: Tensor
    P: Tensor
    mu: Tensor


def moments(x: Inputs, centred: bool, size: int, dtype: torch.dtype) -> Moments:
    """The moments of [W b]: sums of `size` rows in dtype, and the sums of those in float64.

    They cost 2 D d² FLOPs, or D d² where the products are symmetric by blocks.
    """
    _, W, b, _, pi = x
    d, n, mass, as_is = W.shape[1], W.shape[1] + (b is not None), x.mass, _read_as_is(x, dtype)
    shift = W.new_zeros(n, dtype=dtype) if as_is else _shift(x, size, dtype)
    S, r = W.new_zeros(n, n, dtype=torch.float64), W.new_zeros(n, dtype=torch.float64)
    room = None if as_is else chunk_room(W, size, dtype)
    for part in chunks(len(W), size):
        w, w1 = W[part], None if b is None else b[part]
        if room is not None:
            w, w1 = read(w, w1, shift, dtype, room)
        weight = None if pi is None else pi[part].to(dtype)
        y = w if weight is None else w * weight.unsqueeze(1)
        S[:d, :d] += upper_product(w, y, dtype)
        r[:d] += y.sum(0, dtype=dtype)
        if w1 is not None:
            y1 = w1 if weight is None else w1 * weight
            S[:d, d] += product(w.mT, y1.unsqueeze(1), dtype).squeeze(1)
            S[d, d] += (y1.to(dtype) * w1).sum()
            r[d] += y1.sum(dtype=dtype)
    rest = r / mass
    S = _symmetric(S).sub_(torch.outer(r, rest))
    return Moments(S.to(dtype), shift, rest.to(dtype), mass, centred)


def _read_as_is(x: Inputs, dtype: torch.dtype) -> bool:
    """Whether the rows of W are multiplied in half precision, without a copy and without a shift.

    Their common part has been rounded to their few digits anyway.
    """
    return x.pi is None and multiplies(x.W, dtype)


def _shift(x: Inputs, size: int, dtype: torch.dtype) -> Tensor:
    """About the mean row: (n).

    It is the mean of some rows, since reading all rows once more would take a tenth of the time of
    a step. The results are right with any shift, and a shift that is near to the mean keeps their
    digits.
    """
    D, some = len(x.W), _SAMPLE
    if x.pi is not None or some >= D:
        return mean_row(x, size, dtype)
    # multiples of the golden ratio are spread evenly, whatever period the rows have
    at = torch.arange(some, dtype=torch.float64, device=x.W.device)
    places = (at * 0.6180339887498949).frac_().mul_(D).long()
    sample = Inputs(x.H, x.W[places], None if x.b is None else x.b[places], x.target, None)
    return mean_row(sample, size, dtype)


def upper_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper triangle of xᵀy, at least, where that is symmetric."""
    d = x.shape[1]
    if d < 2 * _BLOCK:
        return product(x.mT, y, dtype)
    out = x.new_zeros(d, d, dtype=dtype)
    for part in chunks(d, _BLOCK):
        upper = out[part, part.start :]
        product(x[:, part].mT, y[:, part.start :], dtype, out=upper)
    return out


def _symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).mT


def quadratic_statistics(x: Inputs, at: Moments) -> QuadraticRows:
    """The statistics of the rows of H, in O(m d²)."""
    d, H, S = x.W.shape[1], x.H.to(at.S.dtype), at.S
    P = H @ S[:d, :d]
    if x.b is not None:
        P = P + S[d, :d]
    q = _squares(H, P, S)
    # Equal rows would give S = 0, as the difference of two sums of squares of this size.
    size = H.abs() @ at.rest[:d].abs() + at.rest[d:].abs().sum()
    apart = 2 * (_ERROR * torch.finfo(S.dtype).eps) ** 0.5 * size
    q = above_rounding(q.clamp_min(0), apart, at.mass)
    c = target_outputs(x, at.shift, H.dtype)
    # In float64, since the parts of a mean may cancel: an input that is constant, and a bias.
    wide = H.double()
    mu = _with_bias(wide, at.mean).to(H.dtype)
    c = c - _with_bias(wide, at.rest.double()).to(H.dtype).unsqueeze(1)
    if at.centred:
        return QuadraticRows(torch.zeros_like(q), q, c, P, mu)
    return QuadraticRows(mu * at.mass, q + mu * mu * at.mass, c + mu.unsqueeze(1), P, mu)


def _squares(H: Tensor, P: Tensor, S: Tensor) -> Tensor:
    """hᵀSh (m) of rows h of [H 1], or of H, from P, the first entries of S h."""
    d, q = H.shape[1], (P * H).sum(1)
    return q if len(S) == d else q + H @ S[:d, d] + S[d, d]


def loses_digits(H: Tensor, P: Tensor, S: Tensor) -> Tensor:
    """Whether hᵀSh has lost too many digits in some row of H: a boolean ().

    Each entry of S is a sum with a rounding error in proportion to √(S_ii S_jj), so the error of
    hᵀSh is about c eps Σ_j h_j² S_jj with c ≤ `_ERROR`.
    """
    H, d = H.detach().to(S.dtype), H.shape[1]
    with torch.autocast(H.device.type, enabled=False):
        size = S.diagonal()
        terms = H.square() @ size[:d] + size[d:].sum()
        lost = _ERROR * torch.finfo(S.dtype).eps * terms
        return (lost > _TOLERANCE * _squares(H, P, S)).any()


def _with_bias(H: Tensor, w: Tensor) -> Tensor:
    """[H 1] w for a w (n)."""
    return H @ w[: H.shape[1]] + w[H.shape[1] :].sum()


def _by_output(g: Gradients, mu: Tensor, at: Moments) -> Tensor:
    """The part of ∂ℓ/∂o_k / π_k that is the same for all classes k: a (m)."""
    return -g.c.sum(1) / at.mass if at.centred else g.s + 2 * g.q * mu


def hidden_gradient(x: Inputs, P: Tensor, mu: Tensor, at: Moments, g: Gradients) -> Tensor:
    """∂H (m, d), in the dtype of the moments."""
    d, by_targets = x.W.shape[1], g.c.sum(1)
    out = P * (2 * g.q.unsqueeze(1))
    add_target_rows(out, x.W, x.target, g.c, at.shift)
    out.addr_(by_targets, -at.rest[:d])
    if not at.centred:
        out.addr_(_by_output(g, mu, at) * at.mass + by_targets, at.mean[:d].to(out.dtype))
    return out


def small_gradient(H: Tensor, mu: Tensor, at: Moments, g: Gradients) -> tuple[Tensor, Tensor]:
    """Returns A (n, n) and v (n).

    They give the gradient with respect to [W b] except at the target rows.
    """
    d, n, H = H.shape[1], len(at.shift), H.to(at.S.dtype)
    a = _by_output(g, mu, at)
    A, v = at.S.new_zeros(n, n), at.S.new_zeros(n)
    A[:d, :d] = _symmetric(upper_product(H, H * g.q.unsqueeze(1), H.dtype))
    v[:d] = a @ H
    if n > d:
        A[:d, d] = A[d, :d] = g.q @ H
        A[d, d], v[d] = g.q.sum(), a.sum()
    return A, v


def dense_gradient(
    x: Inputs,
    at: Moments,
    small: tuple[Tensor, Tensor],
    out: tuple[Tensor | None, Tensor | None],
    size: int,
    *,
    fresh: bool,
) -> None:
    """Adds π_k (v + 2 A x_k) to the gradients with respect to W and b; either may be None.

    fresh: whether the gradient with respect to W holds nothing yet, and is written over
    """
    _, W, b, _, pi = x
    A, v = small
    d, dtype, as_is = W.shape[1], A.dtype, _read_as_is(x, A.dtype)
    twice, scale, low, low_column = 2 * A, None, None, None
    if as_is:
        low, scale = rounded(twice[:d], W.dtype)
        # The common part of the rows must meet the same rounded numbers here and in the products.
        twice[:d] = low.to(dtype) * scale
        # contiguous, since products are slow where rows begin at odd places
        low, low_column = low[:, :d].contiguous(), low[:, d:].contiguous()
    v = v - (at.rest.double() @ twice.double()).to(dtype)
    room = None if as_is else chunk_room(W, size, dtype)
    for part in chunks(len(W), size):
        w, w1 = W[part], None if b is None else b[part].to(dtype)
        if room is not None:
            w, w1 = read(w, w1, at.shift, dtype, room)
        weight = None if pi is None else pi[part].to(dtype)
        if out[0] is not None:
            rows = out[0][part]
            direct = fresh and rows.dtype == dtype
            if low is not None and scale is not None:
                G = torch.addcmul(v[:d], product(w, low, dtype), scale)
            else:
                G = torch.addmm(v[:d], w, twice[:d, :d], out=rows if direct else None)
            if w1 is not None:
                G.addr_(w1, twice[d, :d])
            if weight is not None:
                G.mul_(weight.unsqueeze(1))
            if not direct:
                rows.copy_(G) if fresh else rows.add_(G)
        if out[1] is not None and w1 is not None:
            if low_column is not None and scale is not None:
                column = torch.addcmul(v[d], product(w, low_column, dtype).squeeze(1), scale)
            else:
                column = torch.addmv(v[d], w, twice[:d, d])
            column = column + twice[d, d] * w1
            out[1][part].add_(column if weight is None else column * weight)
