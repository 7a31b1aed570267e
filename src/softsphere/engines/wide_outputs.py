"""Outputs of half-precision rows whose gradient with respect to the weight is not rounded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere._torch import transformed
from softsphere.engines.products import multiplies, product

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
        return _product(H, rows.mT, kind, rows.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        H, rows = ctx.saved_tensors
        needs_H, needs_rows, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # operations that can be differentiated again
            return (g @ rows).to(H.dtype), g.mT @ H.to(g.dtype), None
        dH = _product(g, rows, ctx.kind, g.dtype).to(H.dtype) if needs_H else None
        return dH, _product(g.mT, H, ctx.kind, g.dtype) if needs_rows else None, None


def _product(a: Tensor, b: Tensor, kind: torch.dtype, dtype: torch.dtype) -> Tensor:
    a, b = a.to(kind), b.to(kind)
    if not multiplies(a, dtype):
        a, b = a.to(dtype), b.to(dtype)
    with torch.autocast(a.device.type, enabled=False):
        return product(a, b, dtype)
