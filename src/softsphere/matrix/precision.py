"""Arithmetic on the factors, whatever precision the caller has set for the model around them.

Autocast and reduced float32 products are for activations; V is a parameter, and what is written
into it stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["float32_is_exact", "full", "product", "usable_now"]

Method = TypeVar("Method", bound=Callable[..., Any])


def full(method: Method) -> Method:
    """A method of who has a V, without autocast."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.V.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, run)


def float32_is_exact() -> bool:
    """Whether products of float32 are not rounded to TF32 or bfloat16 first."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by other means, and so for a reason
        return False


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the dtype of a, with all its digits."""
    if a.dtype == torch.float64 or float32_is_exact():
        return a @ b.to(a.dtype)
    return (a.double() @ b.double()).to(a.dtype)


def usable_now(x: Tensor) -> bool:
    """Whether x may be changed in place and saved for a backward: not if inference mode made it."""
    return torch.is_inference_mode_enabled() or not x.is_inference()
