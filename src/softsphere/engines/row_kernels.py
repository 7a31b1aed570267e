"""Triton kernels that take one pass over rows, and read rows of W at their targets.

A program has one row i, or one target, and goes through its columns in blocks. H, W and the
gradient of W may have any strides; all other tensors are contiguous. Columns are numbered in int64,
as rows are, since those of a transposed W are far apart. Sums are taken in ACC, the dtype of the
moments, and those that may cancel in float64, which `mu` is stored in.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "hidden_gradient_kernel",
    "parts_kernel",
    "sums_kernel",
    "target_rows_kernel",
]


@triton.jit
def sums_kernel(
    H,
    P,
    W,
    column,
    shift,
    rest,
    mean,
    target,
    squares,
    mu,
    size,
    own,
    d,
    K,
    stride_hm,
    stride_hd,
    stride_wk,
    stride_wd,
    ACC: tl.constexpr,
    BD: tl.constexpr,
):
    """Σ (P + column) h, Σ mean h, Σ |rest h|, and Σ (w_t − shift − rest) h for K targets."""
    i = tl.program_id(0).to(tl.int64)
    of_squares = tl.zeros([BD], ACC)
    of_mean = tl.zeros([BD], tl.float64)
    of_size = tl.zeros([BD], ACC)
    for start in range(0, d, BD):
        j = (start + tl.arange(0, BD)).to(tl.int64)
        there = j < d
        h = tl.load(H + i * stride_hm + j * stride_hd, there, 0.0).to(ACC)
        p = tl.load(P + i * d + j, there, 0.0)
        if column is not None:
            p += tl.load(column + j, there, 0.0)
        of_squares += p * h
        of_mean += tl.load(mean + j, there, 0.0) * h.to(tl.float64)
        of_size += tl.abs(tl.load(rest + j, there, 0.0) * h)
    tl.store(squares + i, tl.sum(of_squares))
    tl.store(mu + i, tl.sum(of_mean))
    tl.store(size + i, tl.sum(of_size))
    for k in range(K):
        t = tl.load(target + i * K + k)
        of_target = tl.zeros([BD], tl.float64)
        for start in range(0, d, BD):
            j = (start + tl.arange(0, BD)).to(tl.int64)
            there = j < d
            h = tl.load(H + i * stride_hm + j * stride_hd, there, 0.0)
            w = tl.load(W + t * stride_wk + j * stride_wd, there, 0.0).to(ACC)
            w = (w - tl.load(shift + j, there, 0.0)).to(tl.float64)
            w -= tl.load(rest + j, there, 0.0).to(tl.float64)
            of_target += w * h.to(tl.float64)
        tl.store(own + i * K + k, tl.sum(of_target).to(ACC))


@triton.jit
def hidden_gradient_kernel(
    P,
    W,
    shift,
    rest,
    mean,
    target,
    of_P,
    gc,
    of_mean,
    out,
    d,
    K,
    stride_wk,
    stride_wd,
    ACC: tl.constexpr,
    BD: tl.constexpr,
):
    """out = of_P P + Σ_k gc_k (w_k − shift − rest) + of_mean mean, in the dtype of out."""
    i = tl.program_id(0).to(tl.int64)
    factor = tl.load(of_P + i)
    for start in range(0, d, BD):
        j = (start + tl.arange(0, BD)).to(tl.int64)
        there = j < d
        total = factor * tl.load(P + i * d + j, there, 0.0)
        common = tl.load(shift + j, there, 0.0)
        left = tl.load(rest + j, there, 0.0)
        for k in range(K):
            t = tl.load(target + i * K + k)
            w = tl.load(W + t * stride_wk + j * stride_wd, there, 0.0).to(ACC)
            total += tl.load(gc + i * K + k) * ((w - common) - left)
        if of_mean is not None:
            total += tl.load(of_mean + i) * tl.load(mean + j, there, 0.0)
        tl.store(out + i * d + j, total.to(out.dtype.element_ty), there)


@triton.jit
def parts_kernel(
    X,
    shift,
    factor,
    out,
    n,
    d,
    stride_xm,
    stride_xd,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """out_i = [a b] or [a]: numbers of KIND with a + EPS b = x, to rounding.

    x = factor_i (X_i − shift). A program has BR rows.
    """
    i = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    row = out + i * (PARTS * d)
    for start in range(0, d, BD):
        j = (start + tl.arange(0, BD)).to(tl.int64)[None, :]
        there = (i < n) & (j < d)
        x = tl.load(X + i * stride_xm + j * stride_xd, there, 0.0).to(tl.float32)
        if shift is not None:
            x -= tl.load(shift + j, j < d, 0.0)
        if factor is not None:
            x *= tl.load(factor + i, i < n, 0.0)
        high = x.to(KIND)
        tl.store(row + j, high.to(out.dtype.element_ty), there)
        if PARTS == 2:
            low = ((x - high.to(tl.float32)) / EPS).to(KIND)
            tl.store(row + d + j, low.to(out.dtype.element_ty), there)


@triton.jit
def target_rows_kernel(
    H,
    gc,
    ordered,
    order,
    out,
    count,
    d,
    K,
    stride_hm,
    stride_hd,
    stride_ok,
    stride_od,
    num_classes,
    ACC: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """out_t += Σ gc_p h_p over the places p of target t, rounded once.

    ordered, order: the targets in ascending order, and their places in (m, K). The program of the
    first place of a target takes all of its places, BR at a time, so that nothing is added twice at
    once. A target that is num_classes stands for none; rows beyond the classes are not written.
    """
    first = tl.program_id(0).to(tl.int64)
    t = tl.load(ordered + first)
    before = tl.load(ordered + first - 1, first > 0, -1)
    if (t != before) & (t >= 0) & (t < num_classes):
        j = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
        there = j < d
        total = tl.zeros([BD], ACC)
        at = first
        going = True
        while going:
            some = at + tl.arange(0, BR)
            mine = tl.load(ordered + some, some < count, -1) == t
            place = tl.load(order + some, mine, 0)
            by = tl.load(gc + place, mine, 0.0)
            rows = H + (place // K)[:, None] * stride_hm + j[None, :] * stride_hd
            h = tl.load(rows, mine[:, None] & there[None, :], 0.0).to(ACC)
            total += tl.sum(by[:, None] * h, 0)
            at += BR
            going = tl.load(ordered + at, at < count, -1) == t
        row = out + t * stride_ok + j * stride_od
        total += tl.load(row, there, 0.0).to(ACC)
        tl.store(row, total.to(out.dtype.element_ty), there)
