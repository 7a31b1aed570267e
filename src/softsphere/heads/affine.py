"""The parameters W and b of an output layer that has them as tensors of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from softsphere import checks
from softsphere.checks.kinds import FLOATING
from softsphere.functional.on_linear import Affine

__all__ = ["made_dtype", "start_as_linear", "whole_layer"]

# What errors call the rows, W and b.
_NAMES = ("hidden", "weight", "bias")


def made_dtype(dtype: Any) -> None:
    """Raises TypeError for a dtype in which there are no such weights."""
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATING))}, got {dtype!r}")


def start_as_linear(W: Tensor, b: Tensor | None) -> None:
    """Draws the initial values of `nn.Linear`, uniform within ±1/√d."""
    bound = 1 / math.sqrt(W.shape[1])
    nn.init.uniform_(W, -bound, bound)
    if b is not None:
        nn.init.uniform_(b, -bound, bound)


def whole_layer(W: Any, b: Any, vectors: Mapping[str, Tensor | None]) -> Affine:
    """W (D, d) and b (D) or None, with further vectors (D) or None that belong to them.

    Raises TypeError or ValueError if they are of a wrong kind or do not fit together, as after one
    was replaced.
    """
    checks.floating("weight", W)
    if b is not None:
        checks.floating("bias", b)
    if W.dim() != 2:
        raise ValueError(f"weight must have shape (num_classes, in_features), got {tuple(W.shape)}")
    for name, x in {"bias": b, **vectors}.items():
        if x is not None and x.shape != W.shape[:1]:
            raise ValueError(
                f"{name} must have shape ({len(W)},), one entry for each row of the weight "
                f"{tuple(W.shape)}, got {tuple(x.shape)}; where the weight was replaced or "
                f"resized, set head.{name} to one of that size, or make a new layer"
            )
    return Affine(W, b, _NAMES)
