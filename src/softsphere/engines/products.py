"""Matrix products of low-precision factors whose results are not rounded."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["multiplies", "product", "rounded"]

# The GPU's matrix units take float16 and bfloat16 and sum in float32; since torch 2.8 that can be
# the result, too.
HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def multiplies(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x can be multiplied as it is, for results in dtype."""
    low = x.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32
    return low and x.is_cuda and HAS_OUT_DTYPE


def product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a b in dtype, of factors in dtype or of such that `multiplies` has allowed."""
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=dtype, out=out)


def rounded(A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A / λ in dtype, and the scale λ, so that small numbers do not vanish in float16."""
    scale = A.abs().amax().clamp_min(torch.finfo(A.dtype).tiny)
    return (A / scale).to(dtype), scale
