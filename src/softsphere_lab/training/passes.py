"""One pass over the training rows, which can be stopped after any step and resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
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
    def begin(cls, order: Tensor, device: torch.device) -> Pass:
        """Returns a pass over the rows with the numbers `order` (N)."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return cls(order, 0, zero, 0.0)

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
        take_step: Callable[[Tensor], Tensor],
        after_step: Callable[[int], None],
        stretch: int,
    ) -> None:
        """Takes steps until no row is left.

        take_step: trains on the rows with those numbers, and returns their mean loss. after_step:
        called with the number of the step in the pass. stretch: the clock is read when that many
        steps are done, before `after_step`, since a GPU has to be waited for then.
        """
        device, step = self.total.device, self.done // batch_size
        start = _clock(device)
        while self.done < len(self.order):
            index = self.order[self.done : self.done + batch_size]
            self.total += take_step(index).double() * len(index)
            self.done += len(index)
            step += 1
            read = step % stretch == 0 or self.done == len(self.order)
            if read:
                self.seconds += _clock(device) - start
            after_step(step)
            if read:
                start = _clock(device)


def _clock(device: torch.device) -> float:
    """The time in seconds, once a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
