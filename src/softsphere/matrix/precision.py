"""Arithmetic on the factors in full precision, whatever the caller has set for the model.

Autocast and reduced float32 products are meant for activations. An error that is written into V, a
parameter, would stay there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from softsphere._torch import (
    products_have_out_dtype,
    sums_of_float16_are_rounded,
    usable_now,
)
from softsphere.half_products import by_float16
from softsphere.matrix.turns import turn
from softsphere.unread import values_are_unread

__all__ = [
    "Rounded",
    "add_matmul",
    "float32_is_exact",
    "float32_may_pay",
    "float32_pays",
    "in_full_precision",
    "is_asynchronous",
    "matmul",
    "product",
]

# The FLOPs above which a GPU should multiply float32 matrices faster in parts of float16, though
# these have to be written, and the width up to which few products of a step have so many. Nobody
# has measured either.
_LARGE, _NARROW = 1 << 33, 512
# The compute capabilities of GPUs that multiply float64 about as fast as float32. Others take 32 or
# 64 times as long (CUDA C++ Programming Guide, "Arithmetic Instructions").
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}

_Method = TypeVar("_Method", bound=Callable[..., Any])


def in_full_precision(method: _Method) -> _Method:
    """Makes a method of an object with a `device` run without autocast and without gradients.

    It also runs outside inference mode, since tensors made there could not be changed in place
    later, and in the turn of its thread.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = self.device.type
        # The meta device has no autocast.
        kind = "cpu" if kind == "meta" else kind
        with turn():
            if _nothing_to_switch_off(kind):
                return method(self, *args, **kwargs)
            autocast = torch.autocast(kind, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), autocast:
                return method(self, *args, **kwargs)

    return cast(_Method, run)


def _nothing_to_switch_off(kind: str) -> bool:
    """Whether autocast for a kind of device, gradients and inference mode are off.

    Asking takes a fraction of the time that switching them off does, which shows in small steps.
    """
    return not (
        torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(kind)
    )


def is_asynchronous(device: torch.device) -> bool:
    """Whether Python has to wait for a device before it can look at a value, or must not look."""
    return device.type != "cpu" or values_are_unread()


def float32_is_exact() -> bool:
    """Whether products of float32 tensors are computed without rounding to TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by other means, so assume that it was lowered
        return False


def product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a b in the dtype of a, computed at least in that precision."""
    if a.dtype == torch.float64 or float32_is_exact():
        return a @ b.to(a.dtype)
    return (a.double() @ b.double()).to(a.dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b (m, p) of matrices of one dtype, with its accuracy whatever is set for float32."""
    if _is_plain(a, b):
        return torch.mm(a, b, out=out)
    if _are_large(2 * a.numel() * b.shape[1], a.device):
        return by_float16(a, b, out)
    result = product(a, b)
    return result if out is None else out.copy_(result)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total ← total + a b, as `matmul`."""
    if _is_plain(a, b):
        return torch.addmm(total, a, b, out=total)
    return total.add_(matmul(a, b))


def _is_plain(a: Tensor, b: Tensor) -> bool:
    """Whether PyTorch's own product has the accuracy of the dtype and is as fast as any."""
    if a.dtype != torch.float32 or not is_asynchronous(a.device):
        return True
    return float32_is_exact() and not _are_large(2 * a.numel() * b.shape[1], a.device)


def float32_may_pay(device: torch.device, width: int) -> bool:
    """Whether some step of a matrix of w columns is taken faster in float32 than in float64."""
    return (width > _NARROW and _has_parts(device)) or _multiplies_float64_slowly(device)


def float32_pays(device: torch.device, rank: int, width: int) -> bool:
    """Whether a step of r factors is."""
    by_parts = width > _NARROW and _are_large(2 * rank * width**2, device)
    return by_parts or (_multiplies_float64_slowly(device) and float32_is_exact())


def _multiplies_float64_slowly(device: torch.device) -> bool:
    """Whether a device takes at least twice as long for float64 as for float32, as a CPU does."""
    if device.type == "cpu":
        return True
    is_gpu = device.type == "cuda"
    return is_gpu and torch.cuda.get_device_capability(device) not in _FAST_FLOAT64


def _are_large(flops: int, device: torch.device) -> bool:
    return flops >= _LARGE and _has_parts(device)


def _has_parts(device: torch.device) -> bool:
    """Whether products of float16 are fast on a device, and can have float32 results."""
    if device.type == "cpu":
        return False
    return products_have_out_dtype() and not sums_of_float16_are_rounded()


class Rounded:
    """Copies of float64 arrays in the dtype of V.

    A copy is made on demand and kept until the array changes. It may be read only before the next
    change, since its memory is used again.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.fresh: set[str] = set()
        # those that a recorded step rounds again itself, so that they last from run to run
        self.lasting: frozenset[str] = frozenset()

    def get(self, name: str, dtype: torch.dtype, parts: Callable[[], Sequence[Tensor]]) -> Tensor:
        """Returns an array rounded to `dtype`: the one, or the sum of two, that `parts` returns."""
        old = self.kept.get(name)
        if old is not None and (old.dtype != dtype or not usable_now(old)):
            old = None
        if old is None or name not in self.fresh:
            first, *rest = parts()
            reused = old is not None and old.shape == first.shape
            if rest:
                self.kept[name] = torch.add(first, rest[0], out=old if reused else None)
            elif first.dtype != dtype and old is not None and reused:
                old.copy_(first)
            else:
                self.kept[name] = first.to(dtype)
            self.fresh.add(name)
        return self.kept[name]

    def forget(self, *names: str) -> None:
        """Notes that these arrays have changed."""
        self.fresh.difference_update(names)

    def forget_all(self) -> None:
        """Notes that no copy has the values of its array."""
        self.fresh.clear()
