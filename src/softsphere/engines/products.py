"""Matrix products of low-precision factors whose results are not rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere._torch import products_have_out_dtype

__all__ = ["multiplies", "product", "rounded"]


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
