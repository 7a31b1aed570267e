"""A step of SGD as a map of the blocks of W and a multiple of the gradient.

The options are those of a param group of `torch.optim.SGD`. A learning rate, a momentum or a weight
decay that is a tensor stays one, so that a step that was captured reads its present value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere.matrix.blocks import Blocks, Number

__all__ = ["momentum_step", "plain_step"]


def plain_step(group: dict[str, Any], count: int) -> Blocks:
    """W ← (1 − lr·weight_decay) W − lr·G, without a change of what is kept beside W."""
    lr, decay = _number(group["lr"]), _number(group["weight_decay"])
    kept = _less(lr, decay)
    diagonal = (kept, *[1.0] * (count - 1))
    base = tuple(tuple(diagonal[a] if a == b else 0.0 for b in range(count)) for a in range(count))
    return Blocks(base, (lr if group["maximize"] else -lr, *[0.0] * (count - 1)))


def momentum_step(group: dict[str, Any], started: bool) -> Blocks:
    """W and B after a step of SGD, as combinations of W, B and G."""
    lr, mu, decay = (_number(group[name]) for name in ("lr", "momentum", "weight_decay"))
    sign = -1.0 if group["maximize"] else 1.0
    share = (1 - _number(group["dampening"])) if started else 1.0
    if not isinstance(mu, Tensor) and mu == 0:
        return Blocks(((_less(lr, decay), 0.0), (0.0, 1.0)), (-lr * sign, 0.0))
    if group["nesterov"]:
        base = ((_less(lr * (1 + mu), decay), decay), (-lr * mu * mu, mu))
        return Blocks(base, (-lr * (1 + mu) * sign, sign))
    base = ((_less(lr * share, decay), share * decay), (-lr * mu, mu))
    return Blocks(base, (-lr * share * sign, share * sign))


def _less(rate: Number, decay: Number) -> Number:
    """1 − rate·decay, which is 1 where there is no decay whatever the rate."""
    return 1.0 if not isinstance(decay, Tensor) and decay == 0 else 1 - rate * decay


def _number(x: Any) -> Number:
    """Returns a number as Python's, and a tensor as a float64 copy without dimensions."""
    return x.detach().to(torch.float64, copy=True).view(()) if isinstance(x, Tensor) else float(x)
