"""What users would take instead: softmax of a linear layer by PyTorch and by kernel libraries."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPU_LAYERS", "LAYERS", "Layer"]

# The loss of hidden rows, a weight and targets.
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def core(chunk: int | None) -> Layer:
    """PyTorch's own without logits: automatic, or with a chunk of rows set by hand."""
    options = None if chunk is None else nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, options=options)

    return loss


LAYERS: dict[str, Callable[[], Layer]] = {
    "softmax": lambda: softmax,
    "softmax, compiled": lambda: torch.compile(softmax),
    **{f"core, chunk {n}": (lambda n=n: core(n)) for n in (64, 256, 1024)},
    "core, automatic": lambda: core(None),
}


def liger(accumulate: bool) -> Layer:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    dtype = torch.float32 if accumulate else None

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, target, None, None, -100, 0.0, 0.0, "mean", None, False, dtype
        )[0]

    return loss


def cut(exact: bool) -> Layer:
    """Apple's; exact: no block is skipped, which older releases say by a threshold of None."""
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    presets = {member.name.lower() for member in LinearCrossEntropyImpl}
    options: dict[str, str | None] = {}
    if exact:
        options = {"impl": "cce_exact"} if "cce_exact" in presets else {"filter_eps": None}

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, **options)

    return loss


GPU_LAYERS: dict[str, Callable[[], Layer]] = {
    "softmax": lambda: softmax,
    "softmax, compiled": lambda: torch.compile(softmax),
    "Liger": lambda: liger(False),
    "Liger, float32 sums": lambda: liger(True),
    "cut cross-entropy": lambda: cut(False),
    "cut cross-entropy, exact": lambda: cut(True),
}
if hasattr(F, "linear_cross_entropy"):
    GPU_LAYERS |= {f"core, chunk {n}": (lambda n=n: core(n)) for n in (1024, 4096)}
    GPU_LAYERS["core, automatic"] = lambda: core(None)
