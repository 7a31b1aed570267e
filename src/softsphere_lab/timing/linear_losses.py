"""Losses of hidden rows and a dense weight, timed forward and backward without an update.

They are those of this library by each engine, and those that users would take instead: softmax by
PyTorch and by kernel libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere import LinearSphericalOptions, SphericalLoss
from softsphere.functional import linear_spherical_loss
from softsphere_lab.timing.memory import extra_bytes
from softsphere_lab.timing.setting import Setting

__all__ = [
    "ENGINES",
    "GPU_SOFTMAX",
    "LINEAR_LOSSES",
    "LOSSES",
    "SOFTMAX",
    "ForwardBackward",
    "LinearLoss",
    "softmax",
    "through_logits",
    "version_of",
]

# The loss of hidden rows (m, d), a weight (D, d) and targets (m).
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSS = "taylor_softmax"
# Those whose grid of sizes docs/engines.md shows.
ENGINES = ("dense", "chunked", "gram")


def _by_engine(engine: str) -> LinearLoss:
    """The library's linear layer, by one of its engines."""
    options = LinearSphericalOptions(engine=engine)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_spherical_loss(hidden, weight, target, LOSS, options=options)

    return loss


def through_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The same loss by a linear layer and a criterion on its outputs."""
    result: Tensor = SphericalLoss(LOSS)(F.linear(hidden, weight), target)
    return result


def softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def _core(chunk: int | None) -> LinearLoss:
    """PyTorch's own fused softmax: with a chunk of rows, or with the one that it chooses."""
    options = None if chunk is None else nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, options=options)

    return loss


def _liger(accumulate: bool) -> LinearLoss:
    """Liger-Kernel's fused softmax. accumulate: whether it sums gradients in float32."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    dtype = torch.float32 if accumulate else None

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, target, None, None, -100, 0.0, 0.0, "mean", None, False, dtype
        )[0]
        return result

    return loss


def _cut_cross_entropy(exact: bool) -> LinearLoss:
    """Apple's. exact: no block is skipped; older releases say so by a threshold of None."""
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    presets = {member.name.lower() for member in LinearCrossEntropyImpl}
    options: dict[str, str | None] = {}
    if exact:
        options = {"impl": "cce_exact"} if "cce_exact" in presets else {"filter_eps": None}

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = linear_cross_entropy(hidden, weight, target, **options)
        return result

    return loss


def version_of(name: str) -> str:
    """The version of the package of a peer, after a space; "" for PyTorch and this library."""
    packages = {"Liger": "liger-kernel", "cut cross-entropy": "cut-cross-entropy"}
    package = packages.get(name.split(",")[0])
    try:
        return f" {version(package)}" if package else ""
    except PackageNotFoundError:
        return ""


def _plain() -> dict[str, Callable[[], LinearLoss]]:
    return {"softmax": lambda: softmax, "softmax, compiled": lambda: torch.compile(softmax)}


def _fused(*chunks: int) -> dict[str, Callable[[], LinearLoss]]:
    """PyTorch's fused softmax, which 2.13 brought."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    return {
        **{f"core, chunk {n}": partial(_core, n) for n in chunks},
        "core, automatic": lambda: _core(None),
    }


# Each is made when it is asked for, since some need packages or a GPU.
SOFTMAX: Mapping[str, Callable[[], LinearLoss]] = {**_plain(), **_fused(64, 256, 1024)}
GPU_SOFTMAX: Mapping[str, Callable[[], LinearLoss]] = {
    **_plain(),
    "Liger": partial(_liger, False),
    "Liger, float32 sums": partial(_liger, True),
    "cut cross-entropy": partial(_cut_cross_entropy, False),
    "cut cross-entropy, exact": partial(_cut_cross_entropy, True),
    **_fused(1024, 4096),
}
LOSSES: Mapping[str, Callable[[], LinearLoss]] = {
    **{name: partial(_by_engine, name) for name in (*ENGINES, "auto")},
    "logits": lambda: through_logits,
    **GPU_SOFTMAX,
    **SOFTMAX,
}


class ForwardBackward:
    """Forward and backward of a loss with a weight of its own; the gradients are left there."""

    def __init__(
        self,
        loss: LinearLoss,
        setting: Setting,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.loss = loss
        bound = 1 / math.sqrt(setting.d)
        weight = torch.empty(setting.D, setting.d, device=device, dtype=dtype)
        weight.uniform_(-bound, bound)
        self.weight = weight.requires_grad_()

    def __call__(self, hidden: Tensor, target: Tensor) -> None:
        hidden.grad = self.weight.grad = None
        self.loss(hidden, self.weight, target).backward()

    def extra_bytes(self, hidden: Tensor, target: Tensor) -> int:
        """Returns the peak of what a call allocates beyond the two gradients."""
        hidden.grad = self.weight.grad = None
        kept = sum(leaf.numel() * leaf.element_size() for leaf in (hidden, self.weight))
        return extra_bytes(lambda: self(hidden, target)) - kept


def _made(name: str, setting: Setting) -> ForwardBackward:
    return ForwardBackward(LOSSES[name](), setting)


LINEAR_LOSSES: Mapping[str, Callable[[Setting], ForwardBackward]] = {
    name: partial(_made, name) for name in LOSSES
}
