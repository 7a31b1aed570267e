"""The devices that tests run on, and how the tensors of a test come to be on one.

A GPU joins by being there. `pytest --stand-in` adds a device that needs none (_stand_in.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_unflatten

GPU = torch.cuda.is_available()
# Triton has no interpreter beside its compiler: kernels run where they run for users.
KERNEL_DEVICE = "cuda" if GPU else "cpu"

_FACTORIES = _device_constructors()
_RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm}
# Constants of test modules by device and identity: as they are, and on the device.
_MOVED: dict[tuple[str, int], tuple[Any, Any]] = {}
_TESTS = str(Path(__file__).parent) + os.sep
_PACKAGE = os.sep + "softsphere" + os.sep


class Placed(TorchFunctionMode):
    """Puts tensors on a device where their maker was given none.

    The package itself is given none only as `device=None`, which a caller has passed on. A tensor
    that it makes without a word about a device stays on the CPU, as it does for users, and meets
    those of the device there. Random numbers are drawn on the CPU, so that they are the same ones.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # Dynamo traces this, and knows no frames
            return func(*args, **kwargs)
        caller = sys._getframe(1).f_code.co_filename
        if func in _FACTORIES:
            of_test = caller.startswith(_TESTS)
            if kwargs.get("device") is None and (of_test or "device" in kwargs):
                return self._made(func, args, kwargs)
        elif _PACKAGE not in caller and _of_cpu(kwargs.get("generator")):
            return self._drawn(func, args, kwargs)
        return func(*args, **kwargs)

    def _made(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func not in _RANDOM:
            return func(*args, **{**kwargs, "device": self.device})
        wanted = kwargs.get("requires_grad", False)
        plain = {**kwargs, "device": "cpu", "requires_grad": False}
        return func(*args, **plain).to(self.device).requires_grad_(wanted)

    def _drawn(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Draws by a generator of the CPU into or from tensors of the device."""
        given = [x for x in args if isinstance(x, Tensor) and x.device.type == self.device.type]
        if not given:
            return func(*args, **kwargs)
        copies = [x.detach().cpu() if isinstance(x, Tensor) else x for x in args]
        found = func(*copies, **kwargs)
        if found is copies[0]:
            return args[0].copy_(found)
        return found.to(self.device)


def constants_moved(device: str, modules: Iterable[ModuleType], patch: pytest.MonkeyPatch) -> None:
    """Replaces the tensors that test modules made when they were imported."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, (Tensor, dict, list, tuple)) and not name.startswith("__"):
                key = device, id(value)
                if key not in _MOVED:
                    _MOVED[key] = value, moved(value, device)
                if _MOVED[key][1] is not value:
                    patch.setattr(module, name, _MOVED[key][1])


def moved(value: Any, device: str) -> Any:
    """A value with its dense tensors on a device; itself, where it has none."""
    leaves, spec = tree_flatten(value)
    if not any(_is_dense(x) for x in leaves):
        return value
    return tree_unflatten([x.to(device) if _is_dense(x) else x for x in leaves], spec)


def _is_dense(x: Any) -> bool:
    return type(x) is Tensor and x.layout == torch.strided and not x.is_meta


def modules_of_tests() -> list[ModuleType]:
    """The modules of the tests that have been imported."""
    files = [(x, getattr(x, "__file__", None) or "") for x in list(sys.modules.values())]
    return [module for module, file in files if file.startswith(_TESTS)]


def capability() -> tuple[int, int] | None:
    """The compute capability of the GPU, if there is one."""
    return torch.cuda.get_device_capability() if GPU else None


def lacking(device: str, gpu: tuple[int, int] | None, given: dict[str, Any]) -> str | None:
    """Why a test with these parameters cannot run on a device, if it cannot.

    gpu: the compute capability of the GPU of the machine.
    """
    if given.get("kernels") and device != "cuda" and (gpu or device == "stand_in"):
        return "Triton compiles kernels for the GPU; it interprets them on a CPU if there is none"
    if device != "cuda" or gpu is None:
        return None
    needs = {"Triton": (7, 0)} if given.get("kernels") else {}
    if any(x is torch.bfloat16 for x in given.values()):
        needs["bfloat16"] = (8, 0)
    for what, least in needs.items():
        if gpu < least:
            needed, has = (".".join(map(str, x)) for x in (least, gpu))
            return f"{what} needs compute capability {needed}, and this GPU has {has}"
    return None


def check_repeated(got: Tensor, want: Tensor) -> None:
    """Checks that the same steps gave the same bits twice.

    On a GPU the additions at equal targets come in any order, so that the last digits may differ.
    """
    least = 1e3 * torch.finfo(got.dtype).eps if got.is_cuda else 0.0
    torch.testing.assert_close(got, want, rtol=least, atol=least)


@contextmanager
def without_gpus() -> Iterator[None]:
    """Processes that are begun meanwhile see no GPU, which PyTorch would choose for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def autocasts(device: str) -> str:
    """The device for torch.autocast; the stand-in has no casts registered."""
    if device == "stand_in":
        pytest.skip("the stand-in has no autocast")
    return device


def _of_cpu(generator: Any) -> bool:
    return isinstance(generator, torch.Generator) and generator.device.type == "cpu"
