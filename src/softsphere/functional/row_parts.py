"""Losses of half-precision logits in parts of rows, whose float32 tensors are small."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import transformed
from softsphere.engines.row_statistics import row_parts

__all__ = ["Part", "in_parts"]

# A slice of the rows, or `...` for all. Logits of shape (C) have one row.
Part = slice | EllipsisType
# Computes the losses of o[part].
Rows = Callable[[Tensor, Part], Tensor]


def in_parts(o: Tensor, rows_of: Rows, *given: Tensor | None) -> Tensor:
    """rows_of(o, ...), where o (..., C) in half precision is read in parts of its rows.

    Nothing but o is kept for the backward, which computes the losses again. `given` are the other
    tensors that rows_of uses. If one of them requires a gradient, there are no parts.
    """
    parts: list[slice] = []
    half = o.dtype in (torch.float16, torch.bfloat16)
    if half and not (torch.compiler.is_compiling() or transformed()):
        parts = row_parts(o)
    if len(parts) < 2 or any(x is not None and x.requires_grad for x in given):
        return rows_of(o, ...)
    rows: Tensor = _InParts.apply(rows_of, parts, o, *given)  # type: ignore[no-untyped-call]
    return rows


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_of: Rows, parts: list[slice], o: Tensor, *given: Tensor | None
    ) -> Tensor:
        # All of them are saved, so that autograd raises if one is changed before the backward.
        ctx.save_for_backward(o, *given)
        ctx.rows_of, ctx.parts = rows_of, parts
        return torch.cat([rows_of(o[part], part) for part in parts])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        o, *given = ctx.saved_tensors
        none = [None] * len(given)
        if torch.is_grad_enabled():  # second derivatives
            rows = ctx.rows_of(o, ...)
            (grad,) = torch.autograd.grad(rows, o, upstream, create_graph=True)
            return None, None, grad, *none
        grad = upstream.new_empty(o.shape, dtype=o.dtype)
        for part in ctx.parts:
            leaf = o[part].detach().requires_grad_()
            with torch.enable_grad():
                rows = ctx.rows_of(leaf, part)
            (grad[part],) = torch.autograd.grad(rows, leaf, upstream[part])
        return None, None, grad, *none
