"""Triton kernels on tiles of the outputs o = W Hᵀ + b, classes down and rows across.

There are m rows, D classes and d columns of W. B* are the sides of a tile, and ACC is the dtype of
sums. Classes run down a tile, since tensor cores want 64 or more of those and as few as 8 across.
Strides are those of the tensors as they came, so that a transposed W or H is read in place.
Products with strides are in int64, since D·d may pass 2³¹. Beyond an edge zeros are loaded and
nothing is stored. Triton takes pointers, sizes and strides one by one, so signatures are long.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["column_sum_kernel", "gradient_kernel", "gram_kernel", "statistics_kernel"]


# Older versions, which come with older versions of PyTorch, multiply float64 only by elements.
DOT_OF_FLOAT64 = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5))


@triton.jit
def add_product(x, y, total, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """total + x y."""
    if DOT_OF_FLOAT64 or tl.float64 != ACC:
        return tl.dot(x, y, total, input_precision=PRECISION, out_dtype=ACC)
    else:
        return total + tl.sum(x.to(ACC)[:, :, None] * y.to(ACC)[None, :, :], 1)


@triton.jit
def output_tile(
    H,
    W,
    b,
    mean,
    rows,
    classes,
    m,
    D,
    d,
    stride_hm,
    stride_hd,
    stride_wk,
    stride_wd,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o − mean (BN, BM) in ACC, for indices of classes and rows in int64; b may be None."""
    width = tl.arange(0, BD).to(tl.int64)
    w_at = W + classes[:, None] * stride_wk + width[None, :] * stride_wd
    h_at = H + rows[None, :] * stride_hm + width[:, None] * stride_hd
    o = tl.zeros((BN, BM), dtype=ACC)
    for start in range(0, d, BD):
        inside = width < d - start
        w = tl.load(w_at, mask=(classes < D)[:, None] & inside[None, :], other=0.0)
        h = tl.load(h_at, mask=inside[:, None] & (rows < m)[None, :], other=0.0)
        o = add_product(w, h, o, PRECISION, ACC)
        w_at += tl.cast(stride_wd, tl.int64) * BD
        h_at += tl.cast(stride_hd, tl.int64) * BD
    if b is not None:
        o += tl.load(b + classes, mask=classes < D, other=0.0).to(ACC)[:, None]
    return o - tl.load(mean + rows, mask=rows < m, other=0.0)[None, :]


@triton.jit
def statistics_kernel(
    H,
    W,
    b,
    pi,
    mean,
    target,
    partial,
    c,
    m,
    D,
    d,
    K,
    splits,
    stride_hm,
    stride_hd,
    stride_wk,
    stride_wd,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (2, splits, m): Σ π o and Σ π o² of o − mean, over every splits-th tile of classes.

    c (m, K) gets o − mean at target (m, K), from the same outputs as the sums; both are contiguous.
    Programs of one split are neighbours, so that their row tiles share W through the cache.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    s = tl.zeros((BM,), dtype=ACC)
    q = tl.zeros((BM,), dtype=ACC)
    for number in range(split, tl.cdiv(D, BN), splits):
        tile = tl.cast(number, tl.int64)
        classes = tile * BN + tl.arange(0, BN)
        o = output_tile(
            H, W, b, mean, rows, classes, m, D, d, stride_hm, stride_hd, stride_wk, stride_wd,
            ACC, BM, BN, BD, PRECISION,
        )  # fmt: skip
        if pi is None:
            # beyond the edge o is −mean, not 0
            weighted = tl.where((classes < D)[:, None], o, 0.0)
        else:
            weighted = o * tl.load(pi + classes, mask=classes < D, other=0.0).to(ACC)[:, None]
        s += tl.sum(weighted, 0)
        q += tl.sum(weighted * o, 0)
        for j in range(K):
            at = rows * K + j
            t = tl.load(target + at, mask=rows < m, other=-1)
            # an integer quotient would take −1 for a part of tile 0
            here = (t >= tile * BN) & (t < tile * BN + BN)
            if tl.max(here.to(tl.int32), 0) > 0:
                own = tl.sum(tl.where(t[None, :] == classes[:, None], o, 0.0), 0)
                tl.store(c + at, own, mask=here)
    at = partial + tl.cast(split, tl.int64) * m + rows
    tl.store(at, s, mask=rows < m)
    tl.store(at + tl.cast(splits, tl.int64) * m, q, mask=rows < m)


@triton.jit
def gradient_kernel(
    H,
    W,
    b,
    pi,
    mean,
    target,
    gs,
    gq,
    gc,
    G,
    first,
    m,
    D,
    d,
    K,
    stride_hm,
    stride_hd,
    stride_wk,
    stride_wd,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G (D, m) = π_k (gs_i + 2 gq_i (o_ik − mean_i)) + Σ_j [k = t_ij] gc_ij.

    This is the gradient with respect to the outputs of a block of D classes, whose W, b and pi are
    given; `first` is the index of the first of them. G, target and gc (m, K) are contiguous.
    """
    row_tiles = tl.cdiv(m, BM)
    rows = (tl.program_id(0) % row_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    tile = (tl.program_id(0) // row_tiles).to(tl.int64)
    classes = tile * BN + tl.arange(0, BN)
    real = rows < m
    g = output_tile(
        H, W, b, mean, rows, classes, m, D, d, stride_hm, stride_hd, stride_wk, stride_wd,
        ACC, BM, BN, BD, PRECISION,
    )  # fmt: skip
    g *= 2 * tl.load(gq + rows, mask=real, other=0.0)[None, :]
    g += tl.load(gs + rows, mask=real, other=0.0)[None, :]
    if pi is not None:
        g *= tl.load(pi + classes, mask=classes < D, other=0.0).to(ACC)[:, None]
    for j in range(K):
        t = tl.load(target + rows * K + j, mask=real, other=first - 1) - first
        here = (t >= tile * BN) & (t < tile * BN + BN)
        if tl.max(here.to(tl.int32), 0) > 0:
            c = tl.load(gc + rows * K + j, mask=real, other=0.0)
            g += tl.where(t[None, :] == classes[:, None], c[None, :], 0.0)
    at = G + classes[:, None] * m + rows[None, :]
    tl.store(at, g.to(G.dtype.element_ty), mask=(classes < D)[:, None] & real[None, :])


@triton.jit
def column_sum_kernel(
    W,
    pi,
    partial,
    D,
    d,
    splits,
    stride_wk,
    stride_wd,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """partial (splits, d): Σ π_k W_k over every splits-th tile of classes."""
    columns = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)
    split = tl.program_id(1)
    total = tl.zeros((BD,), dtype=ACC)
    for tile in range(split, tl.cdiv(D, BN), splits):
        classes = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN)
        at = W + classes[:, None] * stride_wk + columns[None, :] * stride_wd
        w = tl.load(at, mask=(classes < D)[:, None] & (columns < d)[None, :], other=0.0).to(ACC)
        if pi is not None:
            w *= tl.load(pi + classes, mask=classes < D, other=0.0).to(ACC)[:, None]
        total += tl.sum(w, 0)
    tl.store(partial + tl.cast(split, tl.int64) * d + columns, total, mask=columns < d)


@triton.jit
def gram_kernel(
    W,
    pi,
    mean,
    partial,
    D,
    d,
    splits,
    stride_wk,
    stride_wd,
    ACC: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (splits, d, d): Σ π_k (w_k − mean)(w_k − mean)ᵀ over every splits-th tile of classes.

    A tile below the diagonal is neither computed nor stored.
    """
    if tl.program_id(1) > tl.program_id(0):
        return
    down = tl.program_id(1).to(tl.int64) * BJ + tl.arange(0, BJ)
    across = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)
    split = tl.program_id(2)
    Q = tl.zeros((BJ, BJ), dtype=ACC)
    for tile in range(split, tl.cdiv(D, BN), splits):
        classes = tl.cast(tile, tl.int64) * BN + tl.arange(0, BN)
        real = classes < D
        x_at = W + down[:, None] * stride_wd + classes[None, :] * stride_wk
        y_at = W + classes[:, None] * stride_wk + across[None, :] * stride_wd
        x = tl.load(x_at, mask=(down < d)[:, None] & real[None, :], other=0.0)
        y = tl.load(y_at, mask=real[:, None] & (across < d)[None, :], other=0.0)
        if mean is not None:
            x = x.to(ACC) - tl.load(mean + down, mask=down < d, other=0.0)[:, None]
            y = y.to(ACC) - tl.load(mean + across, mask=across < d, other=0.0)[None, :]
            # beyond the edge they are −mean, and one of them must be 0
            x = tl.where(real[None, :], x, 0.0)
        if pi is not None:
            x = x.to(ACC) * tl.load(pi + classes, mask=real, other=0.0).to(ACC)[None, :]
            y = y.to(ACC)
        Q = add_product(x, y, Q, PRECISION, ACC)
    at = partial + (tl.cast(split, tl.int64) * d + down[:, None]) * d + across[None, :]
    tl.store(at, Q, mask=(down < d)[:, None] & (across < d)[None, :])
