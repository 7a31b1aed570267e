"""(s, q, c) of o = H Wᵀ + b by Triton kernels, for few rows on a GPU: no m × D tensor.

Forwards one kernel takes each tile of o to its sums and targets, so that o is never in memory:
2 m D d, and W read once. Backwards another makes the gradient by o anew, G, for one block of
classes at a time, and two plain products take it to ∂W = G H there and ∂H += Gᵀ W. So o is made
twice and not thrice, 8 m D d in all; W is read three times, and once more if centred; G has no
more than `BLOCK` entries, or one tile of classes. Every sum has a fixed order: nothing is atomic.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from softsphere.engines.operators import differentiable_once
from softsphere.engines.row_statistics import above_rounding, accumulator
from softsphere.stats import Stats

try:
    from softsphere.engines import launch
except ImportError as missing:
    if missing.name is None or missing.name.partition(".")[0] != "triton":
        raise
    raise ImportError(
        "the Triton engine needs the package triton, which comes with PyTorch's builds for GPUs "
        "on Linux: install one of those, or run `pip install triton`, or choose another engine"
    ) from missing

__all__ = ["statistics", "symmetric_gram"]

BLOCK = 1 << 25


class Options(Protocol):
    """class_chunk: classes in a block of G; None: as many as BLOCK entries have room for.

    accumulate_dtype: the least that sums are taken in. Rows come in tiles and sums in a fixed
    order whatever is asked, so other options have nothing to change.
    """

    @property
    def class_chunk(self) -> int | None: ...
    @property
    def accumulate_dtype(self) -> torch.dtype: ...


def statistics(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    *,
    centred: bool,
    options: Options,
) -> Stats:
    """Statistics of the rows of H (m, d) with W (D, d) and b (D) or None for targets (m, K).

    pi (D): the base measure, or None; centred: as for logits. s, q and c are in float32, or in
    float64 if H and W are; derivatives by H, W and b in reverse mode, once.

    Raises TypeError unless H and W share one of float16, bfloat16, float32 and float64, and for
    a wider accumulate_dtype; ValueError for tensors on the CPU, unless Triton interprets.
    """
    check(H, W)
    acc = accumulator(H.dtype)
    if options.accumulate_dtype.itemsize > acc.itemsize:
        raise TypeError(
            f"the Triton engine takes sums of {H.dtype} in {acc}, got accumulate_dtype = "
            f"{options.accumulate_dtype}; convert H and W, or choose another engine"
        )
    s, q, c, _ = triton_statistics(H, W, b, target, pi, centred, options.class_chunk or 0)
    return Stats(s, q, c, float(len(W)), pi=None if pi is None else pi[target])


def symmetric_gram(W: Tensor, pi: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
    """Q = Σ_k π_k (w_k − mean)(w_k − mean)ᵀ (d, d) of W (D, d), exactly symmetric.

    pi (D) and mean (d) may be None: ones, and zeros. In float32, or in float64 if W is; D d² in
    place of the 2 D d² of a plain product, and no other D × d tensor. Has no derivative.

    Raises as `statistics` does.
    """
    check(W, W)
    Q: Tensor = triton_gram(W, pi, mean)
    return Q


def check(H: Tensor, W: Tensor) -> None:
    floating = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if H.dtype != W.dtype or W.dtype not in floating:
        raise TypeError(
            "the Triton engine needs H and W both float16, bfloat16, float32 or float64, got "
            f"{H.dtype} and {W.dtype}; convert one of them"
        )
    if W.device.type == "cpu" and not launch.INTERPRETED:
        raise ValueError(
            "the Triton engine needs tensors on a GPU, got W on the CPU; move them, or choose "
            "another engine (TRITON_INTERPRET=1, set before Python starts, runs it here, slowly)"
        )


@torch.library.custom_op("softsphere::triton_statistics", mutates_args=())
def triton_statistics(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    centred: bool,
    class_chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s, q (m), c (m, K), and two means (2, m) without a derivative, 0 unless centred.

    The first has been taken off; the second is that of what was left, and the sum of the two
    would round it away.
    """
    D, acc = len(W), accumulator(H.dtype)
    b, pi = (None if x is None else x.contiguous() for x in (b, pi))
    mean = launch.mean_output(H, W, b, pi) if centred else H.new_zeros(len(H), dtype=acc)
    s, q, c = launch.sums(H, W, b, pi, mean, target.contiguous())
    if not centred:
        return s, q, c, torch.stack([mean, mean])
    # twice, as for logits: the first mean has rounded otherwise than the sum of the outputs
    rest = s / D
    q = above_rounding((q - s * rest).clamp_min(0), mean.unsqueeze(1), D)
    return torch.zeros_like(s), q, c - rest.unsqueeze(1), torch.stack([mean, rest])


@triton_statistics.register_fake
def _(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    centred: bool,
    class_chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = H.new_empty(len(H), dtype=accumulator(H.dtype))
    return rows, rows.clone(), rows.new_empty(target.shape), rows.new_empty(2, len(H))


@torch.library.custom_op(
    "softsphere::triton_gradients",
    mutates_args=(),
    # in words, since PyTorch 2.6 cannot read list[bool]
    schema="(Tensor gs, Tensor gq, Tensor gc, Tensor H, Tensor W, Tensor? b, Tensor target, "
    "Tensor? pi, Tensor mean, SymInt class_chunk, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def triton_gradients(
    gs: Tensor,
    gq: Tensor,
    gc: Tensor,
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    mean: Tensor,
    class_chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """∂H, ∂W and ∂b, each of them empty if not needed."""
    (m, d), D, acc = H.shape, len(W), accumulator(H.dtype)
    gs, gq, gc, target = (x.contiguous() for x in (gs, gq, gc, target))
    b, pi = (None if x is None else x.contiguous() for x in (b, pi))
    gH = H.new_zeros((m, d) if needs[0] else 0, dtype=acc)
    gW = W.new_empty((D, d) if needs[1] else 0)
    gb = mean.new_empty(D if needs[2] else 0)
    size = class_chunk or max(128, BLOCK // max(m, 1) // 128 * 128)
    buffer = H.new_empty((min(size, D), m))
    for first in range(0, D, size):
        part = slice(first, min(first + size, D))
        G = buffer[: part.stop - first]
        launch.output_gradient(H, W, b, pi, mean, target, (gs, gq, gc), first, G)
        if needs[0]:
            gH += G.mT @ W[part]
        if needs[1]:
            torch.mm(G, H, out=gW[part])
        if needs[2]:
            torch.sum(G, 1, dtype=acc, out=gb[part])
    return gH.to(H.dtype), gW, gb if b is None else gb.to(b.dtype)


@triton_gradients.register_fake
def _(
    gs: Tensor,
    gq: Tensor,
    gc: Tensor,
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    target: Tensor,
    pi: Tensor | None,
    mean: Tensor,
    class_chunk: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        H.new_empty(H.shape if needs[0] else 0),
        W.new_empty(W.shape if needs[1] else 0),
        (mean if b is None else b).new_empty(len(W) if needs[2] else 0),
    )


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    H, W, b, target, pi, ctx.centred, ctx.class_chunk = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(H, W, b, target, pi, output[3])


def pull_back(ctx: Any, gs: Tensor, gq: Tensor, gc: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """∂/∂o_k as for logits: centred, gs is −Σ_j gc_j/M less the rest of the mean."""
    H, W, b, target, pi, (mean, rest) = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if ctx.centred:
        gs = -gc.sum(1) / len(W) - 2 * gq * rest
    each = triton_gradients(gs, gq, gc, H, W, b, target, pi, mean, ctx.class_chunk, needs)
    H_W_b = (g if need else None for g, need in zip(each, needs, strict=True))
    return *H_W_b, None, None, None, None


triton_statistics.register_autograd(pull_back, setup_context=save)
differentiable_once(triton_gradients)


@torch.library.custom_op("softsphere::triton_gram", mutates_args=())
def triton_gram(W: Tensor, pi: Tensor | None, mean: Tensor | None) -> Tensor:
    return launch.gram(W, *(None if x is None else x.contiguous() for x in (pi, mean)))


@triton_gram.register_fake
def _(W: Tensor, pi: Tensor | None, mean: Tensor | None) -> Tensor:
    return W.new_empty((W.shape[1],) * 2, dtype=accumulator(W.dtype))
