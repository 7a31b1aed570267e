"""A device for machines without a GPU: it computes on the CPU and is strict about devices."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import cpp_extension

NAME = "stand_in"


@functools.cache
def load() -> None:
    """Compiles the device, or finds it compiled, and makes it known to PyTorch."""
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
