"""(s, q, c) of outputs that are in memory already, without another tensor of their size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere.stats import Stats

__all__ = ["dense_statistics", "statistics"]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums over classes are taken in float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(o: Tensor, target: Tensor, pi: Tensor | None, *, centred: bool) -> Stats:
    """Statistics of o (..., C) for targets (..., K); with pi (C) under that base measure.

    centred: of o − Σ π o / M, for losses that do not see a shift: s is 0 and q a true sum of
    squares, where q − s²/M would have lost its digits.
    """
    s, q, c = RowStatistics.apply(o, target, pi, centred)  # type: ignore[no-untyped-call]
    return Stats(s, q, c, float(o.shape[-1]), pi=None if pi is None else pi[target])


def dense_statistics(o: Tensor, pi: Tensor | None, *, centred: bool, y: Tensor | None) -> Stats:
    """The same with every class a target, c = o: for class probabilities and label smoothing."""
    o = o.to(accumulator(o.dtype))
    if centred:
        o = centre(o, pi)
    weighted = o if pi is None else o * pi
    s = torch.zeros_like(o[..., 0]) if centred else weighted.sum(-1)
    return Stats(s, (weighted * o).sum(-1), o, float(o.shape[-1]), y=y, pi=pi)


class RowStatistics(torch.autograd.Function):
    """s, q (...) and c (..., K) from o (..., C): saves o alone; the gradient is the one tensor.

    ∂/∂o_k = π_k (gs + 2 gq (o_k − μ)) + Σ_j [k = t_j] gc_j − π_k Σ_j gc_j / M, where μ and the
    last term are there only if centred, gs only if not.
    """

    @staticmethod
    def forward(
        o: Tensor, target: Tensor, pi: Tensor | None, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulator(o.dtype)
        c = o.gather(-1, target).to(dtype)
        if pi is None and not centred:
            s = o.sum(-1, dtype=dtype)
            return s, torch.linalg.vector_norm(o, dim=-1, dtype=dtype).square(), c
        d = centre(o, pi) if centred else o.to(dtype)
        weighted = d if pi is None else d * pi
        s = torch.zeros_like(c[..., 0]) if centred else weighted.sum(-1)
        return s, (weighted * d).sum(-1), d.gather(-1, target) if centred else c

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        o, target, pi, ctx.centred = inputs
        ctx.save_for_backward(o, target, pi)

    @staticmethod
    def backward(ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor) -> tuple[Tensor, None, None, None]:
        o, target, pi = ctx.saved_tensors
        d = centre(o, pi) if ctx.centred else o.to(gq.dtype)
        base = -gc.sum(-1) / o.shape[-1] if ctx.centred else gs
        grad = torch.addcmul(base.unsqueeze(-1), d, 2 * gq.unsqueeze(-1))
        if pi is not None:
            grad = grad * pi
        return grad.scatter_add_(-1, target, gc).to(o.dtype), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], o: Tensor, target: Tensor, pi: Any, centred: Any
    ) -> tuple[Any, tuple[int, int, int]]:
        if in_dims[2] is not None:
            raise ValueError("prior must be the same for all of a vmap: pass it with in_dims None")

        def batched(x: Tensor, dim: int | None) -> Tensor:
            return x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)

        o, target = batched(o, in_dims[0]), batched(target, in_dims[1])
        out = RowStatistics.apply(o, target, pi, centred)  # type: ignore[no-untyped-call]
        return out, (0, 0, 0)


def centre(o: Tensor, pi: Tensor | None) -> Tensor:
    """o − Σ π o / M. Twice, since the first mean is rounded to the digits of o, not of the rest."""
    d = o.to(accumulator(o.dtype))
    for _ in range(2):
        d = d - (d if pi is None else d * pi).mean(-1, keepdim=True)
    return d
