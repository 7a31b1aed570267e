"""Training steps of output layers that are timed on a GPU alone: rounded, compiled and captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.steps import Repeated, Step
from softsphere_lab.timing.training_steps import RATE, Softmax, products, repeated

__all__ = ["CAPTURED", "ON_GPU", "SOFTMAX_ON_GPU"]

CAPTURED = "factored Taylor, captured (ours)"


def _softmax(
    setting: Setting, dtype: torch.dtype, compiled: bool, captured: bool
) -> Step | Repeated:
    """Softmax by products in bfloat16, or in float32 rounded to TF32, and PyTorch's fused SGD."""
    torch.backends.cuda.matmul.allow_tf32 = True
    head = Softmax(setting).to(dtype)
    if compiled:
        head.compile(dynamic=False)
    step = Step(head, torch.optim.SGD(head.parameters(), lr=RATE, fused=True))
    return Repeated(step, setting) if captured else step


# The fastest of these is what a layer has to be compared with.
SOFTMAX_ON_GPU: Mapping[str, Callable[[Setting], Any]] = {
    f"softmax, {name}{way}": partial(_softmax, dtype=dtype, compiled=compiled, captured=captured)
    for name, dtype in (("bfloat16", torch.bfloat16), ("TF32", torch.float32))
    for way, compiled, captured in (
        ("", False, False),
        (", compiled", True, False),
        (", captured", False, True),
        (", compiled and captured", True, True),
    )
}
ON_GPU: Mapping[str, Callable[[Setting], Any]] = {
    CAPTURED: repeated,
    **SOFTMAX_ON_GPU,
    # a step computes in float64 on a GPU; this is the part of it that the device's rate decides
    "products of the factored step, float64": partial(products, dtype=torch.float64),
    "products of the factored step, float32": products,
}
