"""Arithmetic on the factors, whatever precision the caller has set for the model around them.

Autocast and reduced float32 products are for activations. V is a parameter, and what is written
into it stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from softsphere._torch import usable_now

__all__ = ["Rounded", "float32_is_exact", "full", "product"]

Method = TypeVar("Method", bound=Callable[..., Any])


def full(method: Method) -> Method:
    """Runs a method of an object that has a `device` without autocast and without a gradient.

    And outside inference mode: what that makes could not be changed in place afterwards.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = self.device.type
        # there is no autocast on the meta device
        autocast = torch.autocast("cpu" if kind == "meta" else kind, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), autocast:
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


class Rounded:
    """Copies of float64 arrays in the dtype of V, made when they are asked for and kept until the
    array has changed. A copy is to be read before the next change only: its memory is used again.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.fresh: set[str] = set()

    def get(self, name: str, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, in `dtype`."""
        old = self.kept.get(name)
        if old is not None and (old.dtype != dtype or not usable_now(old)):
            old = None
        if old is None or name not in self.fresh:
            array = make()
            if array.dtype != dtype and old is not None and old.shape == array.shape:
                old.copy_(array)
            else:
                self.kept[name] = array.to(dtype)
            self.fresh.add(name)
        return self.kept[name]

    def forget(self, *names: str) -> None:
        """These arrays have changed; without a name, all that a step changes have."""
        self.fresh.difference_update(names)
