"""A device for machines without a GPU: it computes on the CPU and is strict about devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NAME = "stand_in"
# Words of the errors where PyTorch has nothing for a device of this kind: functions in transforms,
# sparse and quantised tensors, parts of complex ones.
LIMITS = (
    "BatchedTensorImpl",
    "AutogradPrivateUse1",
    "Sparsestand_in",
    "Quantizedstand_in",
    "view_as_real",
    "NYI devices other than",
)


@functools.cache
def load_stand_in() -> None:
    """Compiles the device, or finds it compiled, and makes it known to PyTorch."""
    from torch.utils import cpp_extension

    source = Path(__file__).with_name("_stand_in.cpp")
    cpp_extension.load("stand_in", str(source), extra_cflags=["-O0"], is_python_module=False)
    torch.utils.rename_privateuse1_backend(NAME)
    module = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        device=lambda number: nullcontext(),
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()


def answer_as_a_gpu() -> None:
    """Has tensors of the stand-in say that they are a GPU's, for the rest of the process.

    The branches for GPUs then run. What they ask of CUDA alone is given by PyTorch's operations:
    products that return another dtype, and copies that are waited for. There are no kernels.
    """
    from softsphere.engines import fused_rows
    from softsphere.matrix import told

    def widening(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(multiply)
        def run(a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Any = None) -> Tensor:
            if out_dtype is not None:
                assert a.dtype == b.dtype, f"a GPU multiplies no {a.dtype} with {b.dtype}"
                a, b = a.to(out_dtype), b.to(out_dtype)
            return multiply(a, b) if out is None else multiply(a, b, out=out)

        return run

    def waited_for(self: told.Told, x: Tensor) -> None:
        self.copy, self.event = x.to("cpu"), None

    torch.Tensor.is_cuda = property(lambda x: x.device.type == NAME)  # type: ignore[assignment]
    torch.mm, torch.bmm = widening(torch.mm), widening(torch.bmm)
    told.Told.__init__ = waited_for  # type: ignore[method-assign]
    fused_rows._INSTALLED = False
