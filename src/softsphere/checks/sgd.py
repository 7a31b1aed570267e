"""Checks of the options of SGD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["learning_rate", "sgd_options"]

# Squares of what a step computes must not overflow in float32.
_LARGEST_RATE = 1e18


def learning_rate(lr: Any, *, unread: bool = False) -> None:
    """Raises ValueError for a learning rate that is negative, too large, or no number.

    unread: whether the value of a tensor is not looked at.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
        if unread:
            return
    value = float(lr)
    if not 0 <= value <= _LARGEST_RATE:
        raise ValueError(f"Invalid learning rate: lr must be from 0 to {_LARGEST_RATE:g}, got {lr}")


def sgd_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that torch.optim.SGD refuses, or that are not finite.

    With the option `capturable` the values of tensors are not looked at.
    """
    unread = bool(options.get("capturable"))
    learning_rate(options["lr"], unread=unread)
    for name in ("momentum", "dampening", "weight_decay"):
        if unread and isinstance(options[name], Tensor):
            continue
        value = float(options[name])
        if not math.isfinite(value) or (value < 0 and name != "dampening"):
            what = "number" if name == "dampening" else "non-negative number"
            raise ValueError(f"Invalid {name} value: it must be a {what}, got {options[name]}")
    if not options["nesterov"]:
        return
    unknown = unread and isinstance(options["momentum"], Tensor)
    if options["dampening"] != 0 or (not unknown and options["momentum"] <= 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
