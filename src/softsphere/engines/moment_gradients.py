"""The gradients with respect to W and b, from the moments of their rows and the targets.

In the letters of `moments`, A (n, n) and v (n) give them but for the targets, by 2 D d² FLOPs:

    ∂[W b]_k = π_k (v + 2 A x_k) + Σ_ij [k = t_ij] g_c h_i.

The two parts nearly cancel late in training, so they are added before they are rounded to the dtype
of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.engines.bfloat16_parts import parts
from softsphere.engines.chunk_sums import upper_product
from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.moments import Moments, read_as_is, symmetric
from softsphere.engines.products import weighted_sum
from softsphere.engines.target_rows import TargetRows
from softsphere.engines.weight import chunk_room, chunks, read
from softsphere.half_products import in_parts, largest, multiplies, product, rounded

__all__ = ["small_gradient", "weight_gradients"]

# Numbers of the rows at the targets, or of the parts of hidden rows, that are computed at once.
_AT_ONCE = 1 << 25
# The fewest rows of a product of hidden rows, which would take less time than what is around it.
_FEWEST = 2048


def small_gradient(H: Tensor, mu: Tensor, at: Moments, g: Gradients) -> tuple[Tensor, Tensor]:
    """Returns A (n, n) and v (n)."""
    d, n, dtype = H.shape[1], len(at.shift), at.S.dtype
    a = at.by_output(g, mu)
    A, v = at.S.new_zeros(n, n), at.S.new_zeros(n)
    A[:d, :d] = _of_rows(H, g.q, dtype)
    v[:d] = weighted_sum(a, H)
    if n > d:
        A[:d, d] = A[d, :d] = weighted_sum(g.q, H)
        A[d, d], v[d] = g.q.sum(), a.sum()
    return A, v


def _of_rows(H: Tensor, gq: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_i g_q h hᵀ (d, d) in dtype.

    Half-precision rows are multiplied as they are, with the sum of two parts of g_q h: what the
    targets add later nearly cancels late in training, and rounding must not be left of it.
    """
    d = H.shape[1]
    if not multiplies(H, dtype):
        H = H.to(dtype)
        return symmetric(upper_product(H, H * gq.unsqueeze(1), dtype))
    scale, eps = largest(gq), torch.finfo(H.dtype).eps
    total = gq.new_zeros(d, d, dtype=dtype)
    most = max(_FEWEST, _AT_ONCE // (2 * max(d, 1)))
    rows = -(-len(H) // max(1, -(-len(H) // most)))  # in pieces of one size
    room = H.new_empty(rows, 2 * d)
    for h, factor in zip(H.split(rows), (gq / scale).split(rows), strict=True):
        X = parts(h, room, None, factor, eps)
        total += upper_product(h, X[:, :d], dtype)
        total.add_(upper_product(h, X[:, d:], dtype), alpha=eps)
    return symmetric(total).mul_(scale)


def weight_gradients(
    x: Inputs,
    at: Moments,
    small: tuple[Tensor, Tensor],
    targets: list[TargetRows],
    wanted: tuple[bool, bool],
    size: int,
    *,
    deterministic: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients with respect to W (D, d) and b (D), of those that are wanted.

    Args:
        x: W, b and π are read of it.
        small: A and v.
        targets: the rows that the targets add.
        wanted: whether W's is wanted, and b's.
        size: the number of rows of W in a chunk.
        deterministic: whether atomic additions are avoided on a GPU.
    """
    _, W, b, _, pi = x
    dW = torch.empty_like(W) if wanted[0] else None
    db = b.new_empty(b.shape, dtype=torch.float64) if b is not None and wanted[1] else None
    if pi is None and read_as_is(x, small[0].dtype):
        if dW is not None:
            _write_roughly(dW, x, at, small, size)
            if targets:
                _write_at_targets(dW, x, at, small, targets, deterministic)
        if db is not None:
            _write_bias_as_is(db, x, at, small)
    else:
        _write_by_chunks((dW, db), x, at, small, targets, size, deterministic)
    if db is None or b is None:
        return dW, None
    for rows in targets:
        rows.add_to_bias(db, deterministic=deterministic)
    return dW, db.to(b.dtype)


def _write_by_chunks(
    out: tuple[Tensor | None, Tensor | None],
    x: Inputs,
    at: Moments,
    small: tuple[Tensor, Tensor],
    targets: list[TargetRows],
    size: int,
    deterministic: bool,
) -> None:
    """Writes the gradients, without what the targets add to b."""
    _, W, b, _, pi = x
    dW, db = out
    A, d, dtype = 2 * small[0], W.shape[1], small[0].dtype
    v = _without_rest(small[1], at, A)
    room = chunk_room(W, size, dtype)
    # the rows of a gradient that is rounded; others are written where they belong
    wide = chunk_room(W, size, dtype) if dW is not None and dW.dtype != dtype else None
    for part in chunks(len(W), size):
        w, w1 = read(W[part], None if b is None else b[part], at.shift, dtype, room)
        weight = None if pi is None else pi[part].to(dtype)
        if dW is not None:
            G = torch.addmm(v[:d], w, A[:d, :d], out=dW[part] if wide is None else wide[: len(w)])
            if w1 is not None:
                G.addr_(w1, A[d, :d])
            if weight is not None:
                G.mul_(weight.unsqueeze(1))
            for rows in targets:
                rows.add_to(G, part, deterministic=deterministic)
            if wide is not None:
                dW[part] = G
        if db is not None and w1 is not None:
            column = torch.addmv(v[d], w, A[:d, d]) + A[d, d] * w1
            db[part] = column if weight is None else column * weight


def _write_roughly(
    out: Tensor, x: Inputs, at: Moments, small: tuple[Tensor, Tensor], size: int
) -> None:
    """out = v + 2 A x_k, with A rounded to the dtype of W.

    The common part of the rows must meet the same rounded numbers here as in the products.
    """
    W, b, d = x.W, x.b, x.W.shape[1]
    A, v = 2 * small[0], small[1]
    if b is None and W.dtype == torch.bfloat16:
        # One product that rounds once. In float16 A would vanish or overflow without a scale.
        low = A.to(W.dtype)
        torch.addmm(_without_rest(v, at, low).to(W.dtype), W, low, out=out)
        return
    low, scale = rounded(A[:d, :d], W.dtype)
    A[:d, :d] = low.to(A.dtype) * scale
    v = _without_rest(v, at, A)[:d]
    for part in chunks(len(W), size):
        G = torch.addcmul(v, product(W[part], low, A.dtype), scale)
        out[part] = G if b is None else G.addr_(b[part].to(A.dtype), A[d, :d])


def _write_at_targets(
    out: Tensor,
    x: Inputs,
    at: Moments,
    small: tuple[Tensor, Tensor],
    targets: list[TargetRows],
    deterministic: bool,
) -> None:
    """Writes the rows of the targets with all digits of A, and what the targets add to them."""
    W, b, (D, d) = x.W, x.b, x.W.shape
    A = 2 * small[0]
    low = in_parts(A[:d, :d], W.dtype)
    A[:d, :d] = low.whole(A.dtype)  # what the common part of the rows is multiplied with, too
    v = _without_rest(small[1], at, A)[:d]
    classes = torch.cat([rows.target.flatten() for rows in targets])
    # either way no more than D of them
    classes = classes.sort().values if len(classes) < D else torch.arange(D, device=W.device)
    for some in classes.split(max(1, _AT_ONCE // max(d, 1))):
        G = low.after(W[some], A.dtype).add_(v)
        if b is not None:
            G.addr_(b[some].to(G.dtype), A[d, :d])
        for rows in targets:
            rows.add_to(G, some, deterministic=deterministic)
        first = torch.searchsorted(some, some)  # equal classes are written with the same row
        out.index_copy_(0, some, G[first].to(out.dtype))


def _write_bias_as_is(out: Tensor, x: Inputs, at: Moments, small: tuple[Tensor, Tensor]) -> None:
    """out = the last entries of v + 2 A x_k."""
    assert x.b is not None
    d = x.W.shape[1]
    A = 2 * small[0]
    low = in_parts(A[:d, d:], x.W.dtype)
    A[:d, d:] = low.whole(A.dtype)
    torch.mul(x.b.double(), A[d, d], out=out)
    out += low.after(x.W, A.dtype).squeeze(1)
    out += _without_rest(small[1], at, A)[d]


def _without_rest(v: Tensor, at: Moments, A: Tensor) -> Tensor:
    """v − A rest: x_k is what the shift has left of a row, less the rest of the mean row."""
    return v - (at.rest.double() @ A.double()).to(v.dtype)
