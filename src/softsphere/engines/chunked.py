"""(s, q, c) of H Wᵀ + b in tiles of rows and classes, the outputs computed anew backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere.engines.operators import (
    differentiable_once,
    empty_gradients,
    upstream,
    where_needed,
)
from softsphere.engines.options import LinearSphericalOptions
from softsphere.engines.row_statistics import above_rounding
from softsphere.engines.weight import (
    accumulator,
    add_target_rows,
    chunks,
    mean_row,
    read,
    scatter,
    target_outputs,
)
from softsphere.stats import Stats

__all__ = ["backward", "forward", "statistics", "tile"]

# Rows and classes of a tile: products of this size run at full speed whatever m, D and d are.
ROWS, CLASSES = 1024, 4096


def tile(options: LinearSphericalOptions) -> tuple[int, int]:
    """Rows and classes of a tile; neither depends on m, D or d, so that none can shrink to one."""
    return options.row_chunk or ROWS, options.class_chunk or CLASSES


def statistics(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    *,
    centred: bool,
    options: LinearSphericalOptions,
) -> Stats:
    """Statistics of H (m, d), W (D, d), b (D) for targets (m, K) with no m × D tensor.

    8 m D d FLOPs forwards and backwards. centred: as for logits.
    """
    dtype = accumulator(H, W, options.accumulate_dtype)
    rows, classes = tile(options)
    s, q, c, *_ = chunked(H, W, b, target, pi, centred, rows, classes, dtype, options.deterministic)
    return Stats(s, q, c, float(len(W)), pi=None if pi is None else pi[target])


def outputs(H: Tensor, x: Tensor, x1: Tensor | None) -> Tensor:
    """The outputs of rows H and classes [x x1]."""
    return H @ x.mT if x1 is None else torch.addmm(x1, H, x.mT)


def forward(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    centred: bool,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    """s, q, c, and for the way back the shift and what it left of the mean output of a row.

    Centred, the shift is the mean of the rows of [W b] to rounding; the rest of the mean is taken
    off by q − s²/M and c − s/M, with nothing left to cancel.
    """
    with torch.autocast(H.device.type, enabled=False):
        shift = mean_row(W, b, pi, classes, dtype) if centred else None
        H = H.to(dtype)
        s, q = H.new_zeros(len(H)), H.new_zeros(len(H))
        for part in chunks(len(W), classes):
            x, x1 = read(W, b, part, shift, dtype)
            weight = None if pi is None else pi[part].to(dtype)
            for row in chunks(len(H), rows):
                o = outputs(H[row], x, x1)
                s[row] += o.sum(1) if weight is None else o @ weight
                o.square_()
                q[row] += o.sum(1) if weight is None else o @ weight
        c = target_outputs(H, W, b, target, shift)
        if shift is None:
            return s, q, c, s.new_empty(0), s.new_empty(0)
        rest = s / len(W)
        size = H.abs() @ shift[: H.shape[1]].abs() + shift[H.shape[1] :].abs().sum()
        q = above_rounding((q - s * rest).clamp_min(0), size.unsqueeze(1), len(W))
        return torch.zeros_like(s), q, c - rest.unsqueeze(1), shift, rest


def backward(
    gs: Tensor,
    gq: Tensor,
    gc: Tensor,
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    shift: Tensor,
    rest: Tensor,
    rows: int,
    classes: int,
    deterministic: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """∂H, ∂W and ∂b, of no entries where not needed: ∂o_k = π_k (g_s + 2 g_q o_k) and g_c at t."""
    dH, dW, db = empty_gradients(H, W, b, needs)
    dtype, shape, off = gq.dtype, H.shape, shift if len(shift) else None
    with torch.autocast(H.device.type, enabled=False):
        if off is not None:
            gs = -gc.sum(1) / len(W) - 2 * gq * rest
        base, twice = gs.unsqueeze(1), 2 * gq.unsqueeze(1)
        wide, back = H.to(dtype), gq.new_zeros(shape if needs[0] else 0)
        for part in chunks(len(W), classes):
            x, x1 = read(W, b, part, off, dtype)
            weight = None if pi is None else pi[part].to(dtype)
            G, g1 = x.new_zeros(x.shape if needs[1] else 0), x.new_zeros(len(x))
            for row in chunks(len(H), rows):
                g = outputs(wide[row], x, x1).mul_(twice[row]).add_(base[row])
                if weight is not None:
                    g.mul_(weight)
                if needs[0]:
                    torch.addmm(back[row], g, x, out=back[row])
                if needs[1]:
                    torch.addmm(G, g.mT, wide[row], out=G)
                if needs[2]:
                    g1 += g.sum(0)
            if needs[1]:
                dW[part] = G
            if needs[2]:
                db[part] = g1
        if needs[0]:
            add_target_rows(back, W, target, gc, off)
            dH = back.to(H.dtype)
        scatter((dW if needs[1] else None, db if needs[2] else None), H, target, gc, deterministic)
    return dH, dW, db


chunked = torch.library.custom_op(
    "softsphere::chunked",
    forward,
    mutates_args=(),
    schema="(Tensor H, Tensor W, Tensor? b, Tensor target, Tensor? pi, bool centred, int rows, "
    "int classes, ScalarType dtype, bool deterministic) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
chunked_backward = torch.library.custom_op(
    "softsphere::chunked_backward",
    backward,
    mutates_args=(),
    schema="(Tensor gs, Tensor gq, Tensor gc, Tensor H, Tensor W, Tensor? b, Tensor target, "
    "Tensor? pi, Tensor shift, Tensor rest, int rows, int classes, bool deterministic, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
)


@chunked.register_fake
def _(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    centred: bool,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    def new(*shape: int) -> Tensor:
        return H.new_empty(shape, dtype=dtype)

    (m, d), K = H.shape, target.shape[1]
    n = d if b is None else d + 1
    return new(m), new(m), new(m, K), new(n if centred else 0), new(m if centred else 0)


@chunked_backward.register_fake
def _(
    gs: Tensor, gq: Tensor, gc: Tensor, H: Tensor, W: Tensor, b: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(H, W, b, rest[-1])


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    H, W, b, target, pi, _, ctx.rows, ctx.classes, ctx.dtype, ctx.deterministic = inputs
    ctx.save_for_backward(H, W, b, target, pi, *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def pull(ctx: Any, gs: Any, gq: Any, gc: Any, *_: None) -> tuple[Tensor | None, ...]:
    saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
    g = upstream(gs, gq, gc, saved[3], ctx.dtype)
    grads = chunked_backward(*g, *saved, ctx.rows, ctx.classes, ctx.deterministic, needs)
    return *where_needed(grads, needs), *[None] * 7


chunked.register_autograd(pull, setup_context=save)
differentiable_once(chunked_backward)
