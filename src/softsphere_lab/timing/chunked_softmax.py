"""Exact softmax of a linear layer by plain PyTorch, in chunks of rows.

The forward computes the logits of a chunk, its loss, and its share of both gradients, and writes
the gradient by the logits over them, so that one chunk of logits is all that is kept. This is what
the kernel libraries do; here the products are PyTorch's, and what lies between them is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["chunked_softmax"]

# Writes the gradient over the logits (n, D) of a chunk; takes its targets (n), and m of the mean.
Body = Callable[[Tensor, Tensor, int], Tensor]


def chunked_softmax(rows: int, compiled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns the mean cross-entropy of hidden rows (m, d), a weight (D, d) and targets (m).

    rows: of a chunk. compiled: whether torch.compile makes what is between the products.
    """
    # few shapes come by: that of a chunk, and that of the last one
    body: Body = (
        torch.compile(_gradient_in_place, dynamic=False) if compiled else _gradient_in_place
    )

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
            hidden, weight, target, rows, body
        )
        return result

    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, rows: int, body: Body
    ) -> Tensor:
        m = len(hidden)
        sums = torch.promote_types(weight.dtype, torch.float32)
        logits = weight.new_empty(min(rows, m), len(weight))
        by_hidden = torch.empty_like(hidden)
        by_weight: Tensor | None = None
        total = torch.zeros((), dtype=sums, device=hidden.device)
        chunks = zip(*(x.split(rows) for x in (hidden, target, by_hidden)), strict=True)
        for h, t, dh in chunks:
            o = logits[: len(h)]
            torch.mm(h, weight.mT, out=o)
            total += body(o, t, m)
            torch.mm(o, weight, out=dh)
            # the product of a single chunk rounds once, and needs no sum
            by_weight = o.mT @ h if len(h) == m else _added(by_weight, o, h, sums)
        ctx.save_for_backward(by_hidden, by_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        # the conversion is part of the product, since the sum may be twice as large as the weight
        weight = torch.empty_like(by_weight, dtype=ctx.dtype)
        torch.mul(by_weight, upstream, out=weight)
        return by_hidden * upstream.to(by_hidden.dtype), weight, None, None, None


def _added(total: Tensor | None, o: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient of the weight plus oᵀh, summed in that dtype in place."""
    if total is None:
        total = torch.zeros(o.shape[1], h.shape[1], dtype=dtype, device=h.device)
    if total.dtype == h.dtype:
        return total.addmm_(o.mT, h)
    if _adds_in_float32(h.device, h.dtype):
        return torch.addmm(total, o.mT, h, out_dtype=dtype, out=total)
    if h.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # since torch 2.8
        return total.add_(torch.mm(o.mT, h, out_dtype=dtype))
    return total.add_(o.mT @ h)


@functools.cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.addmm` adds a product of this dtype to a float32 matrix.

    It does so on a GPU alone. Its first versions asked for a matrix of the dtype of the factors.
    """
    x, total = (torch.ones(1, 1, device=device, dtype=kind) for kind in (dtype, torch.float32))
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _gradient_in_place(logits: Tensor, target: Tensor, m: int) -> Tensor:
    """Writes (softmax − one-hot)/m over the logits, and returns their share of the mean loss."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = wide.logsumexp(1, keepdim=True)
    loss = (normaliser - wide.gather(1, target[:, None])).sum() / m
    classes = torch.arange(logits.shape[1], device=logits.device)
    p = (wide - normaliser).exp()
    logits.copy_(torch.where(classes == target[:, None], p - 1, p) / m)
    return loss
