"""The sums over the rows of a chunk that second moments are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.engines.bfloat16_parts import parts
from softsphere.engines.products import column_sums, sums_by_parts
from softsphere.engines.weight import chunks
from softsphere.half_products import over_rows

__all__ = ["chunk_sums", "chunk_sums_by_parts", "upper_product"]

# Columns of a block of a symmetric product. Only the blocks on and above the diagonal are computed.
# A GPU needs wider ones for its full speed.
_BLOCK, _BLOCK_ON_GPU = 256, 512


def chunk_sums(
    w: Tensor, w1: Tensor | None, weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Σ π w wᵀ (d, d), whose upper triangle counts, Σ π w (d), and Σ π w1 w (d), in dtype.

    w: (n, d) the rows. w1: (n) their entries of the bias, or None. weight: (n) their π, or None.
    """
    y = w if weight is None else w * weight.unsqueeze(1)
    upper, row = upper_product(w, y, dtype), column_sums(y, dtype)
    if w1 is None:
        return upper, row, None
    y1 = w1 if weight is None else w1 * weight
    return upper, row, over_rows(w, y1.unsqueeze(1), dtype).squeeze(1)


def chunk_sums_by_parts(
    w: Tensor, w1: Tensor | None, weight: Tensor | None, shift: Tensor, room: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same sums of rows w − shift, by their bfloat16 parts, which are written into `room`.

    Rows are multiplied with √π, so that both factors of a product are rounded alike.
    """
    d, root = w.shape[1], None if weight is None else weight.sqrt()
    x = parts(w, room, shift, root)
    out = upper_product(x[:, :d], x, shift.dtype)
    upper, cross = out[:, :d], out[:, d:]
    if cross.shape[1]:
        upper = upper + cross + cross.mT
    factor = shift.new_ones(len(w)) if root is None else root
    if w1 is None:
        return upper, sums_by_parts(factor.unsqueeze(0), x, d)[0], None
    row, column = sums_by_parts(torch.stack([factor, factor * w1]), x, d)
    return upper, row, column


def upper_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The upper triangle of xᵀy, at least, where that is symmetric, for x (n, d).

    Columns of y past the d-th are multiplied with all of x.
    """
    d, block = x.shape[1], _BLOCK_ON_GPU if x.is_cuda else _BLOCK
    if d < 2 * block:
        return over_rows(x, y, dtype)
    out = x.new_zeros(d, y.shape[1], dtype=dtype)
    for part in chunks(d, block):
        upper = out[part, part.start :]
        over_rows(x[:, part], y[:, part.start :], dtype, out=upper)
    return out
