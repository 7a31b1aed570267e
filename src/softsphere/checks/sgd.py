"""Checks of the options of SGD."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from softsphere._torch import values_on_cpu

__all__ = ["learning_rate", "sgd_options"]

# Squares of what a step computes must not overflow in float32.
_LARGEST_RATE = 1e18


def learning_rate(lr: Any, *, unread: bool = False) -> None:
    """Raises ValueError or TypeError for a learning rate that is negative, too large, or no number.

    unread: whether the value of a tensor is not looked at where that means waiting for a device.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
        if unread and not values_on_cpu(lr):
            return
    elif not isinstance(lr, numbers.Real):
        raise TypeError(f"lr must be a number or a tensor with one, got {lr!r}")
    value = float(lr)
    if not 0 <= value <= _LARGEST_RATE:
        raise ValueError(f"Invalid learning rate: lr must be from 0 to {_LARGEST_RATE:g}, got {lr}")


def sgd_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that torch.optim.SGD refuses, or that are not finite.

    With the option `capturable` the values of tensors are not looked at on a device.
    """
    unread = bool(options.get("capturable"))
    learning_rate(options["lr"], unread=unread)
    for name in ("momentum", "dampening", "weight_decay"):
        given = options[name]
        if unread and isinstance(given, Tensor) and not values_on_cpu(given):
            continue
        value = float(options[name])
        if not math.isfinite(value) or (value < 0 and name != "dampening"):
            what = "number" if name == "dampening" else "non-negative number"
            raise ValueError(f"Invalid {name} value: it must be a {what}, got {options[name]}")
    if not options["nesterov"]:
        return
    momentum = options["momentum"]
    unknown = unread and isinstance(momentum, Tensor) and not values_on_cpu(momentum)
    if options["dampening"] != 0 or (not unknown and momentum <= 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
