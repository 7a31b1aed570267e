"""Matrix products whose factors have few digits, and whose results are not rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere.engines.bfloat16_parts import number_of_parts, parts, parts_dtype, parts_room
from softsphere.half_products import in_parts, multiplies, over_rows, product

__all__ = ["column_sums", "sums_by_parts", "times", "weighted_sum"]

# Rows of a product that stands for a sum of rows: matrix units have no fewer.
_ROWS = 8
# Numbers of H whose parts are in memory at once.
_AT_ONCE = 1 << 24


def times(H: Tensor, S: Tensor) -> Tensor:
    """H S in the dtype of S.

    Where H is multiplied as it is, S enters as the sum of two parts in the dtype of H. Where
    float32 products need not be exact, both enter as two parts in bfloat16.
    """
    if multiplies(H, S.dtype):
        return in_parts(S, H.dtype).after(H, S.dtype)
    if number_of_parts(H, S.dtype):
        return _times_by_parts(H, S)
    return H.to(S.dtype) @ S


def _times_by_parts(H: Tensor, S: Tensor) -> Tensor:
    """S' (a + b) + S'' a of rows a + b of H, and S = S' + S''."""
    d, kind = H.shape[1], torch.bfloat16
    high, low, scale = in_parts(S, kind)
    high, low = high.to(parts_dtype(H)), low.to(parts_dtype(H))
    twice, P = torch.cat([high, high]), S.new_empty(len(H), S.shape[1])
    size = max(256, _AT_ONCE // max(d, 1))
    room = parts_room(H, size, 2)
    for rows, out in zip(H.split(size), P.split(size), strict=True):
        both = parts(rows, room)
        product(both, twice, S.dtype, out=out)
        out.add_(product(both[:, :d], low, S.dtype), alpha=torch.finfo(kind).eps).mul_(scale)
    return P


def weighted_sum(a: Tensor, H: Tensor) -> Tensor:
    """Σ_i a_i h_i (d) of rows h_i of H (m, d), in the dtype of a (m)."""
    if not multiplies(H, a.dtype):
        return a @ H.to(a.dtype)
    high, low, scale = in_parts(a, H.dtype)
    rows = H.new_zeros(_ROWS, len(a))
    rows[0], rows[1] = high, low
    sums = product(rows, H, a.dtype)
    return (sums[0] + sums[1] * torch.finfo(H.dtype).eps) * scale


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_k x_k (d) of rows x_k of x (D, d), in dtype."""
    if not multiplies(x, dtype):
        return x.sum(0, dtype=dtype)
    return over_rows(x.new_ones(_ROWS, len(x)).mT, x, dtype)[0]


def sums_by_parts(V: Tensor, x: Tensor, d: int) -> Tensor:
    """Σ_i V_ki x_i (k, d) of float32 rows x_i, for V (k, n) and the parts x (n, count · d)."""
    k, n = V.shape
    rows = V.new_zeros(max(_ROWS, 2 * k), n, dtype=parts_dtype(V))
    # not by the kernel, which goes through a row in order
    rows[:k] = V.bfloat16()
    rows[k : 2 * k] = (V - rows[:k]).bfloat16()
    found = over_rows(rows.mT, x, V.dtype)
    return (found[:k] + found[k : 2 * k]).view(k, -1, d).sum(1)
