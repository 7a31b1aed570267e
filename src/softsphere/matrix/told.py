"""A number on a device that Python wants to know, but not now."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Told"]


class Told:
    """The value that a tensor () has once the work that was given to its device so far is done.

    On a GPU it is copied behind that work. Reading it waits for the copy, and for nothing that the
    device was given later.
    """

    def __init__(self, x: Tensor) -> None:
        # Elsewhere there is no event to wait for, so the copy is made at once.
        self.copy = x.to("cpu", non_blocking=x.is_cuda)
        self.event: torch.cuda.Event | None = None
        if x.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(x.device))

    def value(self) -> float:
        """Returns the number."""
        if self.event is not None:
            self.event.synchronize()
        return float(self.copy)
