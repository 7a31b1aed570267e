"""The products and passes of a GPU on a CPU: products put in by hand, kernels interpreted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from _engines import OPERATORS
from softsphere import half_products
from softsphere.engines import (
    bfloat16_parts,
    chunked,
    fused_rows,
    moment_gradients,
    moments,
    products,
)

HALVES = (torch.bfloat16, torch.float16)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the kernels need the package triton"
)


def as_on_a_gpu(
    monkeypatch, *, kernels: bool = False, float32: str = "highest"
) -> list[torch.dtype]:
    """Has half-precision factors multiplied as they are; returns the dtypes of all factors used.

    kernels: whether passes over rows are made by kernels, which Triton interprets.
    float32: the precision that products of float32 tensors may have.
    """
    used = []

    def product(x, y, out_dtype, out=None):
        used.append(x.dtype)
        return torch.matmul(x.to(out_dtype), y.to(out_dtype), out=out)

    def multiplies(x, dtype):
        return x.dtype in HALVES and dtype == torch.float32

    monkeypatch.setattr(moments, "multiplies", multiplies)
    for module in (half_products, products, moment_gradients, chunked):
        monkeypatch.setattr(module, "multiplies", multiplies)
        monkeypatch.setattr(module, "product", product)
    for module in (products, bfloat16_parts):
        monkeypatch.setattr(module, "parts_dtype", lambda x: torch.bfloat16)
    float32_may_be(monkeypatch, float32)
    if kernels:
        with_kernels(monkeypatch)
    return used


def float32_may_be(monkeypatch, precision: str) -> None:
    """Has the engines take float32 products to be rounded so; the products are what they are."""
    monkeypatch.setattr(bfloat16_parts, "float32_precision", lambda device: precision)


# The places of factors in the arguments of products.
_FACTORS = {
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.addmv: (1, 2),
    torch.ops.aten.bmm: (0, 1),
    torch.ops.aten.linear: (0, 1),
    torch.ops.aten.matmul: (0, 1),
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.mv: (0, 1),
}


class _Rounding(TorchDispatchMode):
    """Rounds the float32 factors of products to some bits, the first one not counted."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = _FACTORS.get(func.overloadpacket, ())
        rounded = [nearest(x, self.bits) if i in places else x for i, x in enumerate(args)]
        return func(*rounded, **(kwargs or {}))


def nearest(x: Tensor, bits: int) -> Tensor:
    """x, where it is float32 the nearest number with so many bits after the first."""
    if x.dtype != torch.float32:
        return x
    cut = 23 - bits
    whole = x.contiguous().view(torch.int32)
    even = whole + (1 << (cut - 1)) - 1 + ((whole >> cut) & 1)
    return torch.where(x.isfinite(), (even >> cut << cut).view(torch.float32), x)


@contextmanager
def float32_rounded_to(bits: int, *, outside: bool = True) -> Iterator[None]:
    """Rounds factors as matrix units do: 10 bits are TF32, 7 are bfloat16.

    What bfloat16 holds stays as it is.

    outside: whether products outside of operators are rounded as well. If so, the package takes
    itself to be traced, and looks at no values.
    """
    mode = _Rounding(bits)

    def inside(compute: Callable) -> Callable:
        def call(*args):
            with mode:
                return compute(*args)

        return call

    with ExitStack() as stack:
        for engine in OPERATORS.values():
            for name in ("forward", "backward"):
                # operators are frozen data
                stack.enter_context(patch.dict(vars(engine), {name: inside(getattr(engine, name))}))
        if outside:
            stack.enter_context(mode)
        yield


def with_kernels(monkeypatch) -> dict[str, int]:
    """Has the kernels make the passes over rows; returns how often each one was launched."""
    launched: dict[str, int] = {}
    monkeypatch.setattr(fused_rows, "usable", lambda x: True)
    for name in fused_rows.__all__:
        if name != "usable":
            monkeypatch.setattr(fused_rows, name, _counted(getattr(fused_rows, name), launched))
    return launched


def without_kernels(monkeypatch) -> None:
    """Has PyTorch's operations make the passes over rows, also on a GPU."""
    monkeypatch.setattr(fused_rows, "usable", lambda x: False)


def _counted(function: Callable, counts: dict[str, int]) -> Callable:
    def call(*args):
        counts[function.__name__] = counts.get(function.__name__, 0) + 1
        return function(*args)

    return call
