"""(s, q, c) of H Wᵀ + b from the Gram matrix of [W b]: O(D d²), and nothing of m × D.

Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; the Gram identity for squared
losses also in Krichene et al. 2018, arXiv:1807.07187.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere.engines import moments
from softsphere.engines.moments import Gradients, Moments
from softsphere.engines.operators import (
    differentiable_once,
    empty_gradients,
    upstream,
    where_needed,
)
from softsphere.engines.options import LinearSphericalOptions
from softsphere.engines.weight import accumulator, scatter
from softsphere.stats import Stats

__all__ = ["backward", "chunk_size", "forward", "statistics"]

# Numbers of W in a chunk: enough for products at full speed, few enough for what is copied of it.
CHUNK, CHUNK_ON_GPU = 1 << 23, 1 << 25


def chunk_size(W: Tensor, given: int | None) -> int:
    """Rows of W in a chunk, never few of them."""
    numbers = CHUNK_ON_GPU if W.is_cuda else CHUNK
    return given or max(256, numbers // max(W.shape[1], 1))


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
    """Statistics of H (m, d), W (D, d), b (D) for targets (m, K); no m × D tensor, no copy of W.

    4 D d² + 4 m d² FLOPs forwards and backwards, less for d ≥ 512. centred: as for logits. q is
    right to the accumulating dtype's digits of ‖S‖ ‖h‖², not of itself: where h is nearly
    orthogonal to all of W, accumulate in float64.
    """
    size = chunk_size(W, options.class_chunk)
    dtype = accumulator(H, W, options.accumulate_dtype)
    s, q, c, *_ = gram(H, W, b, target, pi, centred, size, dtype, options.deterministic)
    return Stats(s, q, c, float(len(W)), pi=None if pi is None else pi[target])


def forward(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    centred: bool,
    size: int,
    dtype: torch.dtype,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    """s, q, c, and for the way back P, S, r and the shift (of no entries where there is none)."""
    with torch.autocast(H.device.type, enabled=False):
        at = moments.moments(W, b, pi, centred, size, dtype)
        shift = at.r.new_empty(0) if at.shift is None else at.shift
        return *moments.statistics(H, W, b, target, at), at.S, at.r, shift


def backward(
    gs: Tensor,
    gq: Tensor,
    gc: Tensor,
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    P: Tensor,
    S: Tensor,
    r: Tensor,
    shift: Tensor,
    size: int,
    deterministic: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """∂H, ∂W and ∂b, of no entries where not needed."""
    at, g = Moments(S, r, shift if len(shift) else None), Gradients(gs, gq, gc)
    dH, dW, db = empty_gradients(H, W, b, needs)
    with torch.autocast(H.device.type, enabled=False):
        if needs[0]:
            dH = moments.hidden_gradient(W, target, P, at, g).to(H.dtype)
        out = dW if needs[1] else None, db.zero_() if needs[2] else None
        if needs[1] or needs[2]:
            small = moments.small_gradient(H, at, g, len(W))
            moments.dense_gradient(W, b, pi, at.shift, small, out, size, fresh=True)
            scatter(out, H, target, gc, deterministic)
    return dH, dW, db


gram = torch.library.custom_op(
    "softsphere::gram",
    forward,
    mutates_args=(),
    schema="(Tensor H, Tensor W, Tensor? b, Tensor target, Tensor? pi, bool centred, int size, "
    "ScalarType dtype, bool deterministic) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
gram_backward = torch.library.custom_op(
    "softsphere::gram_backward",
    backward,
    mutates_args=(),
    schema="(Tensor gs, Tensor gq, Tensor gc, Tensor H, Tensor W, Tensor? b, Tensor target, "
    "Tensor? pi, Tensor P, Tensor S, Tensor r, Tensor shift, int size, bool deterministic, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
)


@gram.register_fake
def _(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    centred: bool,
    size: int,
    dtype: torch.dtype,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    def new(*shape: int) -> Tensor:
        return H.new_empty(shape, dtype=dtype)

    (m, d), K = H.shape, target.shape[1]
    n = d if b is None else d + 1
    return new(m), new(m), new(m, K), new(m, d), new(n, n), new(n), new(n if centred else 0)


@gram_backward.register_fake
def _(
    gs: Tensor, gq: Tensor, gc: Tensor, H: Tensor, W: Tensor, b: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(H, W, b, rest[-1])


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    H, W, b, target, pi, _, ctx.size, ctx.dtype, ctx.deterministic = inputs
    ctx.save_for_backward(H, W, b, target, pi, *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def pull(ctx: Any, gs: Any, gq: Any, gc: Any, *_: None) -> tuple[Tensor | None, ...]:
    saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
    g = upstream(gs, gq, gc, saved[3], ctx.dtype)
    grads = gram_backward(*g, *saved, ctx.size, ctx.deterministic, needs)
    return *where_needed(grads, needs), *[None] * 6


gram.register_autograd(pull, setup_context=save)
differentiable_once(gram_backward)
