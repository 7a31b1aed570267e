"""The engine "triton": (s, q, c) of H Wᵀ + b by Triton kernels, for few rows on a GPU.

There is no tensor of m × D entries. The forward kernel takes each tile of outputs to its sums and
targets at once, so that outputs are never in memory: 2 m D d FLOPs, and W is read once. The
backward kernel computes the outputs again and makes the gradient with respect to them, G, for one
block of classes at a time; two plain products give ∂W = G H there, and ∂H += Gᵀ W. So the outputs
are computed twice rather than three times, 8 m D d FLOPs in all. W is read three times, and once
more if centred. G has at most `_BLOCK` entries, or one tile of classes. Every sum has a fixed
order, and no addition is atomic.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from softsphere.engines.engine import Engine, Gradients, Inputs, Settings, Workload
from softsphere.engines.operators import LinearOperator
from softsphere.engines.row_statistics import accumulator
from softsphere.engines.weight import spread_of_outputs
from softsphere.rounding import above_rounding

__all__ = ["TRITON", "TRITON_INSTALLED", "symmetric_gram"]

TRITON_INSTALLED = find_spec("triton") is not None
_BLOCK = 1 << 25


def _launch() -> ModuleType:
    """The module that launches the kernels, imported when it is first used.

    It needs the package triton, and reads TRITON_INTERPRET when it is imported.
    """
    from softsphere.engines import launch

    return launch


def _check(x: Inputs, how: Settings) -> None:
    """Raises what the kernels cannot do: ImportError, TypeError or ValueError."""
    H, W = x.H, x.W
    if not TRITON_INSTALLED:
        raise ImportError(
            "engine='triton' needs the triton package, which is not installed; it comes with "
            "PyTorch's builds for GPUs on Linux: install one of those, run `pip install triton`, "
            "or use engine='auto', 'gram' or 'chunked'"
        )
    if W.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"engine='triton' needs tensors on a CUDA device, got {W.device}; use engine='auto', "
            "'gram' or 'chunked', or set TRITON_INTERPRET=1 before Python starts, to debug its "
            "kernels slowly"
        )
    if H.dtype != W.dtype or W.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        raise TypeError(
            "engine='triton' needs H and W both float16, bfloat16, float32 or float64, got "
            f"{H.dtype} and {W.dtype}; convert one of them"
        )
    if how.dtype != accumulator(H.dtype):
        raise TypeError(
            f"engine='triton' takes sums of {H.dtype} in {accumulator(H.dtype)}, got "
            f"accumulate_dtype = {how.dtype}; convert H and W, or use another engine"
        )


def _with_contiguous_vectors(x: Inputs) -> Inputs:
    b, pi = (None if t is None else t.contiguous() for t in (x.b, x.pi))
    return Inputs(x.H, x.W, b, x.target.contiguous(), pi)


def _forward(x: Inputs, how: Settings) -> tuple[Tensor, ...]:
    """s, q, c, and for the backward two means of the outputs of a row, both 0 unless centred.

    The first mean has been taken off the outputs. The second is the mean of the rest, and is
    kept apart, since it would be rounded away in the sum of the two.
    """
    launch, x = _launch(), _with_contiguous_vectors(x)
    if not how.centred:
        mean = x.H.new_zeros(len(x.H), dtype=how.dtype)
        return *launch.sums(x, mean), mean, mean.clone()
    mean = launch.mean_output(x)
    s, q, c = launch.sums(x, mean)
    rest = s / x.mass
    q = above_rounding((q - s * rest).clamp_min(0), spread_of_outputs(x, how.dtype), x.mass)
    return torch.zeros_like(s), q, c - rest.unsqueeze(1), mean, rest


def _backward(
    g: Gradients,
    x: Inputs,
    kept: tuple[Tensor, ...],
    how: Settings,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂H, ∂W and ∂b, from the gradient G with respect to a block of outputs at a time."""
    launch, x, (mean, rest) = _launch(), _with_contiguous_vectors(x), kept
    H, W, b, _, _ = x
    (m, d), D = H.shape, len(W)
    base = -g.c.sum(1) / x.mass - 2 * g.q * rest if how.centred else g.s
    upstream = Gradients(*(t.contiguous() for t in (base.to(how.dtype), g.q, g.c)))
    dH = H.new_zeros((m, d), dtype=how.dtype) if needs[0] else None
    dW = W.new_empty((D, d)) if needs[1] else None
    db = mean.new_empty(D) if needs[2] and b is not None else None
    size = how.class_chunk or max(128, _BLOCK // max(m, 1) // 128 * 128)
    buffer = H.new_empty((min(size, D), m))
    for first in range(0, D, size):
        part = slice(first, min(first + size, D))
        G = buffer[: part.stop - first]
        launch.output_gradient(x, mean, upstream, first, G)
        if dH is not None:
            dH += G.mT @ W[part]
        if dW is not None:
            torch.mm(G, H, out=dW[part])
        if db is not None:
            torch.sum(G, 1, dtype=how.dtype, out=db[part])
    return (
        None if dH is None else dH.to(H.dtype),
        dW,
        None if db is None or b is None else db.to(b.dtype),
    )


def _able(work: Workload) -> bool:
    return work.triton and work.device == "cuda"


def _cost(work: Workload) -> float:
    return 8 * work.m * work.D * work.n + work.target_rows


# kept: the two means (m)
_OPERATOR = LinearOperator("triton", _forward, _backward, keeps=("m", "m"))
TRITON = Engine("triton", _OPERATOR, _cost, _able, chunks=("class_chunk",), check=_check)


def symmetric_gram(W: Tensor, pi: Tensor | None = None, mean: Tensor | None = None) -> Tensor:
    """Q = Σ_k π_k (w_k − mean)(w_k − mean)ᵀ (d, d) of W (D, d), exactly symmetric.

    pi (D) and mean (d) may be None: ones, and zeros. Q is in float32, or in float64 if W is. It
    costs D d² FLOPs where a plain product costs 2 D d², and makes no other D × d tensor. It has no
    derivative.
    """
    _check(Inputs(W, W, None, W, None), Settings(False, None, None, accumulator(W.dtype), False))
    Q: Tensor = _gram_operator(W, pi, mean)
    return Q


@torch.library.custom_op("softsphere::triton_gram", mutates_args=())
def _gram_operator(W: Tensor, pi: Tensor | None, mean: Tensor | None) -> Tensor:
    Q: Tensor = _launch().gram(W, *(None if x is None else x.contiguous() for x in (pi, mean)))
    return Q


@_gram_operator.register_fake
def _(W: Tensor, pi: Tensor | None, mean: Tensor | None) -> Tensor:
    return W.new_empty((W.shape[1],) * 2, dtype=accumulator(W.dtype))
