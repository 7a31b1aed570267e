"""The products and passes of a GPU on a CPU: products put in by hand, kernels interpreted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from softsphere.engines import fused_rows, moments, products

HALVES = (torch.bfloat16, torch.float16)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the kernels need the package triton"
)


def as_on_a_gpu(monkeypatch, *, kernels: bool = False) -> list[torch.dtype]:
    """Has half-precision factors multiplied as they are; returns the dtypes of all factors used.

    kernels: whether passes over rows are made by kernels, which Triton interprets.
    """
    used = []

    def product(x, y, out_dtype, out=None):
        used.append(x.dtype)
        return torch.mm(x.to(out_dtype), y.to(out_dtype), out=out)

    def multiplies(x, dtype):
        return x.dtype in HALVES and dtype == torch.float32

    for module in (products, moments):
        monkeypatch.setattr(module, "multiplies", multiplies)
        monkeypatch.setattr(module, "product", product)
    if kernels:
        with_kernels(monkeypatch)
    return used


def with_kernels(monkeypatch) -> dict[str, int]:
    """Has the kernels make the passes over rows; returns how often each one was launched."""
    launched: dict[str, int] = {}
    monkeypatch.setattr(fused_rows, "usable", lambda x: True)
    for name in fused_rows.__all__:
        if name != "usable":
            monkeypatch.setattr(fused_rows, name, _counted(getattr(fused_rows, name), launched))
    return launched


def _counted(function: Callable, counts: dict[str, int]) -> Callable:
    def call(*args):
        counts[function.__name__] = counts.get(function.__name__, 0) + 1
        return function(*args)

    return call
