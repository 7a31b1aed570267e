"""Which training steps of the lab are one CUDA graph, and why the others are taken as they are.

On a GPU a step of a small network is a hundred short operations and more, and launching them takes
longer than running them. A step is captured wherever its shapes are fixed and it reads no value on
the device. The last batch of an epoch, which may be smaller, is always trained on as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softsphere.captured import CapturedStep, captures, check_taken
from softsphere.heads import ClusteredLoss
from softsphere.optim import FactoredSGD
from softsphere_lab.models.baselines import AdaptiveSoftmax
from softsphere_lab.records.environment import is_eager

__all__ = ["ITEMS", "TIMED", "Steps", "obstacle_of"]

# Why a step is not captured.
ITEMS = "each batch of users has another number of items"
_PROCESSES = "the processes that train a run together compare their arguments in every step"
TIMED = "the engines are compared as they are called without a graph"
_LAYERS: Mapping[type[nn.Module], str] = {
    AdaptiveSoftmax: "the number of rows in each of its clusters is read in every step",
    ClusteredLoss: "the rows of a step are grouped by the clusters that they meet",
}


def obstacle_of(head: nn.Module, group: dist.ProcessGroup | None = None) -> str | None:
    """Returns why a training step with an output layer cannot be captured, or None.

    group: the processes that train together.
    """
    if group is not None:
        return _PROCESSES
    return next((why for kind, why in _LAYERS.items() if isinstance(head, kind)), None)


class Steps:
    """Takes the training steps of a run, each full batch by a CUDA graph where that is possible.

    optimizers: those that a step steps. rows: those of a full batch. obstacle: why no step can be
    captured, if so.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        rows: int,
        obstacle: str | None,
    ) -> None:
        self.optimizers, self.device, self.rows = optimizers, device, rows
        wanted = captures(device) and not is_eager()
        self.captures = wanted and obstacle is None
        self.captured: CapturedStep | None = None
        self.place_rates()

    def __call__(self, step: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Takes a step and returns its loss.

        step: a function of tensors that reads nothing on the device, the same in all calls. inputs:
        its arguments, each with a row for each row of the batch.
        """
        if not self.captures or len(inputs[0]) != self.rows:
            return step(*inputs)
        if self.captured is None:
            self.captured = CapturedStep(step, self.optimizers, *inputs)
        loss = self.captured(*inputs)
        assert isinstance(loss, Tensor)
        return loss

    def check(self) -> None:
        """Raises SingularStepError if a step was left out on a GPU, which it waits for."""
        check_taken(self.optimizers)

    def release(self) -> None:
        """Gives back the memory of the graph. The next full batch is captured again."""
        self.captured = None

    def place_rates(self) -> None:
        """Has captured steps read their learning rates from the device, where schedulers set them.

        It is called once there are schedulers, which then know the rates as numbers, and whenever a
        state was loaded.
        """
        if not self.captures:
            return
        for optimizer in self.optimizers:
            # PyTorch's fused kernels read a rate in float32 alone
            dtype = torch.float64 if isinstance(optimizer, FactoredSGD) else torch.float32
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype, device=self.device)
                if "capturable" in group:
                    group["capturable"] = True

    def states(self, rates: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        """Returns the states of the optimizers as if no step was captured.

        rates: the learning rate of each group of each optimizer, which may be on a device there.
        """
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        if not self.captures:
            return states
        return [
            {
                **state,
                "param_groups": [
                    group | {"lr": rate} | ({"capturable": False} if "capturable" in group else {})
                    for group, rate in zip(state["param_groups"], its, strict=True)
                ],
            }
            for state, its in zip(states, rates, strict=True)
        ]
