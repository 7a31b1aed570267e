"""Checks of the kind of a tensor: dense, and of a dtype that can be computed with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dense(name: str, value: Any) -> None:
    """A tensor that has all its numbers side by side: not sparse, nested or quantised."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(value)}")
    if value.is_nested:
        raise TypeError(
            f"{name} must be an ordinary tensor, got a nested one; use "
            "torch.nested.to_padded_tensor, and ignore_index for the padding"
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got layout {value.layout}; use {name}.to_dense()"
        )
    if value.is_quantized:
        raise TypeError(f"{name} must not be quantised, got {value.dtype}; use {name}.dequantize()")


def shown(value: Any) -> str:
    """What came in place of a tensor, without the numbers of a long list.

    >>> shown([1, 2, 3]), shown("mean")
    ('a list of length 3; use torch.as_tensor', "'mean'")
    """
    if isinstance(value, (list, tuple, range)) or hasattr(value, "__array__"):
        sized = getattr(value, "shape", True) != () and hasattr(value, "__len__")
        length = f" of length {len(value)}" if sized else ""
        return f"a {type(value).__name__}{length}; use torch.as_tensor"
    return f"{value!r:.200}"


def floating(name: str, value: Any) -> None:
    """A dense tensor of float16, bfloat16, float32 or float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a floating-point tensor, got {shown(value)}")
    dense(name, value)
    if not value.is_floating_point():
        cure = f"{name}.real" if value.is_complex() else f"{name}.float()"
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}; use {cure}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}; "
            f"use {name}.to(torch.bfloat16)"
        )


def is_integer(value: Any) -> bool:
    """Whether value is a tensor of integers."""
    return isinstance(value, Tensor) and not (
        value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    )
