"""Training steps as they are timed: by Python, or by a program that is made once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import CapturedStep
from softsphere_lab.timing.setting import Setting

__all__ = ["Repeated", "Step"]


@dataclass(frozen=True)
class Step:
    """Forward, backward and update of an output layer; returns the loss before the update."""

    head: nn.Module
    optimizer: Any

    def __call__(self, hidden: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.head(hidden, target)
        loss.backward()
        self.optimizer.step()
        return loss


class Repeated:
    """A training step that a GPU captures or a CPU compiles, and how each of its calls was taken.

    A call returns the loss and the gradient of the hidden rows.

    Attributes:
        eager: for each call so far, whether Python ran the step, and no graph.
    """

    def __init__(self, step: Step, setting: Setting, *, compile: bool = False) -> None:
        self._step = step
        self._runs = 0
        self.eager: list[bool] = []
        device = step.optimizer.param_groups[0]["params"][0].device
        examples = setting.batch(torch.Generator(device).manual_seed(0))
        self._captured = CapturedStep(self._train, step.optimizer, *examples, compile=compile)

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
        result = self._captured(hidden.detach(), target)
        self.eager.append(self._runs - self.captures > before)
        return result
