"""(s, q, c) of outputs that are in memory already, without another tensor of their size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from softsphere._torch import transforms_active
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
    at = None if pi is None else pi[target]
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        # A function with a rule for forward-mode derivatives cannot be compiled, so those get
        # plain operations.
        x = dense_statistics(o, pi, centred=centred, y=None)
        return Stats(x.s, x.q, x.c.gather(-1, target), x.mass, pi=at)
    s, q, c = RowStatistics.apply(o, target, pi, centred)  # type: ignore[no-untyped-call]
    return Stats(s, q, c, float(o.shape[-1]), pi=at)


def dense_statistics(o: Tensor, pi: Tensor | None, *, centred: bool, y: Tensor | None) -> Stats:
    """The same with every class a target, c = o: for class probabilities and label smoothing."""
    o = o.to(accumulator(o.dtype))
    if not centred:
        weighted = o if pi is None else o * pi
        s, q = weighted.sum(-1), (weighted * o).sum(-1)
        return Stats(s, q, o, float(o.shape[-1]), y=y, pi=pi)
    d, mean = centre(o, pi)
    q = above_rounding((d * d if pi is None else d * d * pi).sum(-1), mean, o.shape[-1])
    return Stats(torch.zeros_like(q), q, d, float(o.shape[-1]), y=y, pi=pi)


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
        # a copy, since the compiler of torch 2.11 loses the gradient of one that .to() gives back
        c = o.gather(-1, target).to(dtype, copy=True)
        if pi is None and not centred:
            return o.sum(-1, dtype=dtype), sum_of_squares(o, dtype), c
        if pi is not None and not centred:
            d = o.to(dtype)
            weighted = d * pi
            return weighted.sum(-1), (weighted * d).sum(-1), c
        d, mean = centre(o, pi)
        q = sum_of_squares(d, dtype) if pi is None else (d * d * pi).sum(-1)
        return torch.zeros_like(q), above_rounding(q, mean, o.shape[-1]), d.gather(-1, target)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        o, target, pi, ctx.centred = inputs
        ctx.save_for_backward(o, target, pi)

    @staticmethod
    def backward(ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor) -> tuple[Tensor, None, None, None]:
        o, target, pi = ctx.saved_tensors
        d = centre(o, pi)[0] if ctx.centred else o.to(gq.dtype)
        base = -gc.sum(-1) / o.shape[-1] if ctx.centred else gs
        grad = torch.addcmul(base.unsqueeze(-1), d, 2 * gq.unsqueeze(-1))
        if pi is not None:
            grad = grad * pi
        # PyTorch 2.6 has no rule for the one in place inside vmap
        add = grad.scatter_add if transforms_active() else grad.scatter_add_
        return add(-1, target, gc).to(o.dtype), None, None, None

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


def sum_of_squares(o: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ o² over the last dimension, in parts: one sum of a million squares loses five digits."""
    parts = torch.split(o, 1 << 14, dim=-1)
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype).square() for part in parts]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)


def centre(o: Tensor, pi: Tensor | None) -> tuple[Tensor, Tensor]:
    """o − μ with μ = Σ π o / M, and μ (..., 1).

    Twice, since the first mean is rounded to the digits of o, not of the rest.
    """
    d = o.to(accumulator(o.dtype))
    mean = average(d, pi)
    d = d - mean
    return d - average(d, pi), mean


def average(d: Tensor, pi: Tensor | None) -> Tensor:
    return (d if pi is None else d * pi).mean(-1, keepdim=True)


def above_rounding(q: Tensor, mean: Tensor, num_classes: int) -> Tensor:
    """q, or 0 where centring equal outputs has left nothing but rounding."""
    least = torch.finfo(q.dtype).eps * mean.squeeze(-1).abs() / 8
    # so that what is not a number stays that
    return torch.where(q <= num_classes * least * least, 0.0, q)
