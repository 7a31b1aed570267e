"""Training steps of output layers that are timed on a GPU alone: rounded, compiled and captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softsphere import CapturedStep, FactoredSphericalLoss
from softsphere.optim import FactoredSGD
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import (
    LOSS,
    RATE,
    Softmax,
    Step,
    products,
    rate_of,
)

__all__ = ["CAPTURED", "ON_GPU", "SOFTMAX_ON_GPU", "Repeated"]

CAPTURED = "factored Taylor, captured (ours)"


class Repeated:
    """A training step that a GPU repeats as one graph, and how each of its calls was taken.

    A call returns the loss and the gradient of the hidden rows.

    Attributes:
        eager: for each call so far, whether Python ran the step, and no graph.
    """

    def __init__(self, step: Step, setting: Setting) -> None:
        self._step = step
        self._runs = 0
        self.eager: list[bool] = []
        device = step.optimizer.param_groups[0]["params"][0].device
        examples = setting.batch(torch.Generator(device).manual_seed(0))
        self._captured = CapturedStep(self._train, step.optimizer, *examples)

    @property
    def captures(self) -> int:
        """How many graphs have been captured so far."""
        return self._captured.captures

    def _train(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self._runs += 1
        hidden = hidden.detach().requires_grad_()
        loss, gradient = self._step(hidden, target), hidden.grad
        assert gradient is not None
        return loss, gradient

    def __call__(self, hidden: Tensor, target: Tensor) -> Any:
        # Python runs the step to capture it as well, and the graph is replayed then
        before = self._runs - self.captures
        result = self._captured(hidden, target)
        self.eager.append(self._runs - self.captures > before)
        return result


def _factored(setting: Setting) -> Repeated:
    """The step of `training_steps.factored`, captured."""
    head = FactoredSphericalLoss(setting.d, setting.D, LOSS, bias=False)
    rate = torch.tensor(rate_of(setting, LOSS), dtype=torch.float64)
    optimizer = FactoredSGD(head.parameters(), lr=rate, capturable=True)
    return Repeated(Step(head, optimizer), setting)


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
    CAPTURED: _factored,
    **SOFTMAX_ON_GPU,
    # a step computes in float64 on a GPU; this is the part of it that the device's rate decides
    "products of the factored step, float64": partial(products, dtype=torch.float64),
    "products of the factored step, float32": products,
}
