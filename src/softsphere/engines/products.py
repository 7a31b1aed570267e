"""Matrix products of half-precision factors whose results are not rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere._torch import products_have_out_dtype

__all__ = ["column_sums", "in_parts", "multiplies", "product", "rounded", "times", "weighted_sum"]

# Rows of a product that stands for a sum of rows: matrix units have no fewer.
_ROWS = 8


def multiplies(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x can be multiplied as it is, for results in dtype.

    The matrix units of a GPU multiply float16 and bfloat16 and sum in float32.
    """
    low = x.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32
    return low and x.is_cuda and products_have_out_dtype()


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a b in dtype, for factors in dtype or factors that `multiplies` allows."""
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)


def rounded(A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A / λ in dtype, and the scale λ, so that small numbers do not vanish in float16."""
    scale = A.abs().amax().clamp_min(torch.finfo(A.dtype).tiny)
    return (A / scale).to(dtype), scale


def in_parts(A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns B and C in dtype and a scale λ with A = λ (B + eps C), for eps that of dtype.

    The two parts have twice the digits of dtype: A is right to eps²/4 or so of its largest entry.
    """
    high, scale = rounded(A, dtype)
    rest = (A / scale - high) / torch.finfo(dtype).eps
    return high, rest.to(dtype), scale


def times(H: Tensor, S: Tensor) -> Tensor:
    """H S in the dtype of S.

    Where H is multiplied as it is, S enters as the sum of two parts in the dtype of H.
    """
    if not multiplies(H, S.dtype):
        return H.to(S.dtype) @ S
    high, low, scale = in_parts(S, H.dtype)
    P = product(H, low, S.dtype).mul_(torch.finfo(H.dtype).eps)
    return P.add_(product(H, high, S.dtype)).mul_(scale)


def weighted_sum(a: Tensor, H: Tensor) -> Tensor:
    """Σ_i a_i h_i (d) of rows h_i of H (m, d), in the dtype of a (m)."""
    if not multiplies(H, a.dtype):
        return a @ H.to(a.dtype)
    high, low, scale = in_parts(a, H.dtype)
    parts = H.new_zeros(_ROWS, len(a))
    parts[0], parts[1] = high, low
    sums = product(parts, H, a.dtype)
    return (sums[0] + sums[1] * torch.finfo(H.dtype).eps) * scale


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_k x_k (d) of rows x_k of x (D, d), in dtype."""
    if not multiplies(x, dtype):
        return x.sum(0, dtype=dtype)
    return product(x.new_ones(_ROWS, len(x)), x, dtype)[0]
