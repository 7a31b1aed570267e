"""Losses of hidden rows and a dense weight, timed forward and backward without an update.

They are those of this library by each engine, and the softmaxes that users would take instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere import LinearSphericalOptions, SphericalLoss
from softsphere.functional import linear_spherical_loss
from softsphere_lab.timing.memory import extra_bytes
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.softmax_peers import GPU_SOFTMAX, SOFTMAX, LinearLoss

__all__ = [
    "ENGINES",
    "LINEAR_LOSSES",
    "LOSS",
    "LOSSES",
    "ForwardBackward",
    "LinearLoss",
    "through_logits",
]

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


# Each is made when it is asked for, since some need packages or a GPU.
LOSSES: Mapping[str, Callable[[], LinearLoss]] = {
    **{name: partial(_by_engine, name) for name in (*ENGINES, "auto")},
    "logits": lambda: through_logits,
    **{name: peer.make for name, peer in {**GPU_SOFTMAX, **SOFTMAX}.items()},
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
