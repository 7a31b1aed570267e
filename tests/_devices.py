"""The devices that tests run on, and how the tensors of a test come to be on one.

A GPU joins by being there. `pytest --stand-in` adds a device that needs none (_stand_in.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

GPU = torch.cuda.is_available()
# Triton has no interpreter beside its compiler: kernels run where they run for users.
KERNEL_DEVICE = "cuda" if GPU else "cpu"

_FACTORIES = _device_constructors()
_RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm}
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


def lacking(capability: tuple[int, int], given: dict[str, Any]) -> str | None:
    """What a GPU of this compute capability lacks for a test with these parameters, if anything."""
    needs = {}
    if any(x is torch.bfloat16 for x in given.values()):
        needs["bfloat16"] = (8, 0)
    if given.get("kernels"):
        needs["Triton"] = (7, 0)
    for what, least in needs.items():
        if capability < least:
            needed, has = (".".join(map(str, x)) for x in (least, capability))
            return f"{what} needs compute capability {needed}, and this GPU has {has}"
    return None


def _of_cpu(generator: Any) -> bool:
    return isinstance(generator, torch.Generator) and generator.device.type == "cpu"
