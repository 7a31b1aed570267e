"""One pass over the training rows, which can be stopped after any step and resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pass"]


@dataclass
class Pass:
    """An unfinished epoch.

    order: (N) the row numbers in the order in which they come. done: how many of them were trained
    on. total: the sum of their losses, in float64. seconds: of training alone.
    """

    order: Tensor
    done: int
    total: Tensor
    seconds: float

    @classmethod
    def begin(cls, rows: int, generator: torch.Generator, device: torch.device) -> Pass:
        """Returns a pass over all rows in random order."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(torch.randperm(rows, generator=generator), 0, zero, 0.0)

    def state(self) -> dict[str, Any]:
        """Returns what `again` takes."""
        return asdict(self)

    @classmethod
    def again(cls, state: dict[str, Any], device: torch.device) -> Pass:
        """Returns the pass that had this state, on that device."""
        return cls(**{**state, "total": state["total"].to(device)})

    @property
    def loss(self) -> float:
        """The mean loss over all rows, once they are done."""
        return float(self.total) / len(self.order)

    def train(
        self,
        batch_size: int,
        loss_of: Callable[[Tensor], Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        before_step: Callable[[], None],
        after_step: Callable[[int], None],
    ) -> None:
        """Takes steps until no row is left.

        loss_of: returns the mean loss of the rows with those numbers. before_step: called once the
        gradients are there. after_step: called with the number of the step in the pass; its time is
        not counted.
        """
        device, step = self.total.device, self.done // batch_size
        while self.done < len(self.order):
            start = _clock(device)
            index = self.order[self.done : self.done + batch_size]
            loss = loss_of(index.to(device))
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            before_step()
            for optimizer in optimizers:
                optimizer.step()
            self.total += loss.detach().double() * len(index)
            self.done += len(index)
            self.seconds += _clock(device) - start
            step += 1
            after_step(step)


def _clock(device: torch.device) -> float:
    """The time in seconds, once a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
