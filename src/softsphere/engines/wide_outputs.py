"""Outputs of half-precision rows whose gradient with respect to the weight is not rounded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere._torch import transformed
from softsphere.half_products import multiplies, product, rounded

__all__ = ["wide_outputs"]


def wide_outputs(H: Tensor, rows: Tensor, kind: torch.dtype) -> Tensor:
    """H rowsᵀ (m, n) of factors that are rounded to `kind`, in the dtype of rows.

    The gradient with respect to rows can be added to another one with which it nearly cancels:
    that of `F.linear` would have been rounded to `kind` before.

    Args:
        H: (m, d).
        rows: (n, d) in float32 or wider.
        kind: the dtype in which a GPU multiplies.
    """
    if kind == rows.dtype or transformed():
        return F.linear(H.to(rows.dtype), rows)
    out: Tensor = _Outputs.apply(H, rows, kind)  # type: ignore[no-untyped-call]
    return out


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, H: Tensor, rows: Tensor, kind: torch.dtype) -> Tensor:
        ctx.save_for_backward(H, rows)
        ctx.kind = kind
        return _product(H.to(kind), rows.mT, kind, rows.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        H, rows = ctx.saved_tensors
        needs_H, needs_rows, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # operations that can be differentiated again
            return (g @ rows).to(H.dtype), g.mT @ H.to(g.dtype), None
        # scaled, so that small gradients do not vanish in float16
        g, scale = rounded(g, ctx.kind) if multiplies(H.to(ctx.kind), g.dtype) else (g, 1.0)
        dH = _product(g, rows, ctx.kind, rows.dtype).mul_(scale).to(H.dtype) if needs_H else None
        dW = _product(g.mT, H, ctx.kind, rows.dtype).mul_(scale) if needs_rows else None
        return dH, dW, None


def _product(a: Tensor, b: Tensor, kind: torch.dtype, dtype: torch.dtype) -> Tensor:
    """a b in dtype, with b rounded to `kind`, and a where a GPU multiplies such factors."""
    b = b.to(kind)
    if multiplies(b, dtype):
        a = a.to(kind)
    else:
        a, b = a.to(dtype), b.to(dtype)
    with torch.autocast(a.device.type, enabled=False):
        return product(a, b, dtype)
