"""(s, q, c) of outputs that are in memory already, without another tensor of their size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere._torch import forward_mode_active, transforms_active
from softsphere.rounding import above_rounding, error_of_sum
from softsphere.stats import Stats

__all__ = ["dense_statistics", "output_statistics", "row_parts", "wide_dtype"]

# The number of outputs whose copies in a wider dtype are in memory at once.
ON_CPU, ON_DEVICE = 1 << 20, 1 << 24


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over classes are taken in float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_statistics(
    o: Tensor,
    target: Tensor,
    pi: Tensor | None,
    *,
    centred: bool,
    mass: Tensor | None = None,
) -> Stats:
    """Statistics of o (..., C) for targets (..., K) under the base measure π, (C) or (..., C).

    centred: of o − Σ π o / M, for losses that are invariant to a shift. Then s is 0 and q a true
        sum of squares, where q − s²/M would have lost its digits.
    mass: M, () or (...), for the result; None means C.
    """
    at = None if pi is None else _at_targets(pi, target)
    of_each_row = pi is not None and (pi.dim() > 1 or (mass is not None and transforms_active()))
    if forward_mode_active() or of_each_row:
        # A function with a rule for forward-mode derivatives cannot be compiled, and one for a
        # measure of each row would save it. Those get plain operations.
        x = dense_statistics(o, pi, centred=centred, y=None, mass=mass)
        return Stats(x.s, x.q, x.c.gather(-1, target), x.mass, pi=at)
    s, q, c = _RowStatistics.apply(o, target, pi, centred)  # type: ignore[no-untyped-call]
    return Stats(s, q, c, float(o.shape[-1]) if mass is None else mass, pi=at)


def dense_statistics(
    o: Tensor, pi: Tensor | None, *, centred: bool, y: Tensor | None, mass: Tensor | None = None
) -> Stats:
    """The same with every class a target, c = o: for class probabilities and label smoothing."""
    o = o.to(wide_dtype(o.dtype))
    total = float(o.shape[-1]) if mass is None else mass
    if not centred:
        weighted = o if pi is None else o * pi
        return Stats(weighted.sum(-1), (weighted * o).sum(-1), o, total, y=y, pi=pi)
    d, apart = _centre(o, pi)
    q = (d * d if pi is None else d * d * pi).sum(-1)
    q = above_rounding(q, apart, _mass(o, pi))
    return Stats(torch.zeros_like(q), q, d, total, y=y, pi=pi)


class _RowStatistics(torch.autograd.Function):
    """s, q (...) and c (..., K) from o (..., C). It saves o alone, and its gradient is one tensor.

    ∂/∂o_k = π_k (gs + 2 gq (o_k − μ)) + Σ_j [k = t_j] gc_j − π_k Σ_j gc_j / M, where μ and the
    last term are present only if centred, and gs only if not.
    """

    @staticmethod
    def forward(
        o: Tensor, target: Tensor, pi: Tensor | None, centred: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = [_forward(o[part], target[part], pi, centred) for part in _parts(o, pi, centred)]
        if len(parts) == 1:
            return parts[0]
        s, q, c = (torch.cat(x) for x in zip(*parts, strict=True))
        return s, q, c

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        o, target, pi, ctx.centred = inputs
        ctx.save_for_backward(o, target, pi)

    @staticmethod
    def backward(ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor) -> tuple[Tensor | None, ...]:
        o, target, pi = ctx.saved_tensors
        parts = _parts(o, pi, ctx.centred)
        if len(parts) == 1 or torch.is_grad_enabled() or transforms_active():
            grad = _backward(o, target, pi, ctx.centred, (gs, gq, gc))
            return grad, None, None, None
        # of several at once under autograd.grad(is_grads_batched=True), as upstream is
        grad = gs.new_empty(o.shape, dtype=o.dtype)
        for part in parts:
            g = gs[part], gq[part], gc[part]
            grad[part] = _backward(o[part], target[part], pi, ctx.centred, g)
        return grad, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], o: Tensor, target: Tensor, *rest: Any
    ) -> tuple[Any, tuple[int, int, int]]:
        if in_dims[2] is not None:
            raise ValueError("prior must be the same for all of a vmap: pass it with in_dims None")

        def batched(x: Tensor, dim: int | None) -> Tensor:
            return x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)

        o, target = batched(o, in_dims[0]), batched(target, in_dims[1])
        out = _RowStatistics.apply(o, target, *rest)  # type: ignore[no-untyped-call]
        return out, (0, 0, 0)


def _forward(
    o: Tensor, target: Tensor, pi: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide_dtype(o.dtype)
    # a copy, since the compiler of torch 2.11 loses the gradient of one that .to() gives back
    c = o.gather(-1, target).to(dtype, copy=True)
    if pi is None and not centred:
        return o.sum(-1, dtype=dtype), _sum_of_squares(o, dtype), c
    if pi is not None and not centred:
        d = o.to(dtype)
        weighted = d * pi
        return weighted.sum(-1), (weighted * d).sum(-1), c
    d, apart = _centre(o, pi)
    q = _sum_of_squares(d, dtype) if pi is None else (d * d * pi).sum(-1)
    return (
        torch.zeros_like(q),
        above_rounding(q, apart, _mass(o, pi)),
        d.gather(-1, target),
    )


def _backward(
    o: Tensor,
    target: Tensor,
    pi: Tensor | None,
    centred: bool,
    upstream: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    gs, gq, gc = upstream
    d = _centre(o, pi)[0] if centred else o.to(gq.dtype)
    base = -gc.sum(-1) / _mass(o, pi) if centred else gs
    grad = torch.addcmul(base.unsqueeze(-1), d, 2 * gq.unsqueeze(-1))
    if pi is not None:
        grad = grad * pi
    # PyTorch 2.6 has no rule for the operation in place inside vmap
    add = grad.scatter_add if transforms_active() else grad.scatter_add_
    return add(-1, target, gc).to(o.dtype)


def _parts(o: Tensor, pi: Tensor | None, centred: bool) -> list[slice]:
    """`row_parts`, unless nothing is copied."""
    copied = centred or pi is not None or wide_dtype(o.dtype) != o.dtype
    return row_parts(o) if copied else [slice(None)]


def row_parts(o: Tensor) -> list[slice]:
    """Slices of the first dimension of o, of which copies in a wider dtype are small."""
    size = ON_CPU if o.device.type == "cpu" else ON_DEVICE
    if o.dim() < 2 or o.numel() <= size or torch.compiler.is_compiling():
        return [slice(None)]
    step = max(1, size * o.shape[0] // o.numel())
    return [slice(start, start + step) for start in range(0, o.shape[0], step)]


def _at_targets(pi: Tensor, target: Tensor) -> Tensor:
    return pi[target] if pi.dim() == 1 else pi.gather(-1, target)


def _sum_of_squares(o: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ o² over the last dimension, in parts: one sum of a million squares loses five digits."""
    parts = torch.split(o, 1 << 14, dim=-1)
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype).square() for part in parts]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)


def _centre(o: Tensor, pi: Tensor | None) -> tuple[Tensor, Tensor]:
    """o − μ with μ = Σ π o / M, and how far from 0 that may be on both sides if all o are equal.

    A mean is subtracted twice, since the first one is rounded to the digits of o, not of the rest.
    If all o are equal, all of the rest is equal as well, and the second mean differs from it by
    rounding alone.
    """
    d = o.to(wide_dtype(o.dtype))
    d = d - _average(d, pi)
    rest = _average(d, pi)
    apart = 2 * error_of_sum(o.shape[-1], d.dtype) * rest.detach().squeeze(-1).abs()
    return d - rest, apart


def _average(d: Tensor, pi: Tensor | None) -> Tensor:
    if pi is None:
        return d.mean(-1, keepdim=True)
    mean: Tensor = (d * pi).sum(-1) / _mass(d, pi)
    return mean.unsqueeze(-1)


def _mass(o: Tensor, pi: Tensor | None) -> Any:
    """Σ π: (), or (...) for a measure of each row; the number of classes if π = 1."""
    return o.shape[-1] if pi is None else pi.sum(-1, dtype=torch.float64).to(pi.dtype)
