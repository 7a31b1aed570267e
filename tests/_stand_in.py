"""A device for machines without a GPU: it computes on the CPU and is strict about devices."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

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
