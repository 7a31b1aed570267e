"""A CUDA graph, whose capture leaves things in order also where it fails."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Graph", "LostCaptureError"]

Result = TypeVar("Result")


class LostCaptureError(RuntimeError):
    """A capture that did not end in order, after which PyTorch may fail at the next one."""


class Graph:
    """A CUDA graph of what a function launches on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()

    @staticmethod
    def warmed_up(function: Callable[[], Result], device: torch.device) -> Result:
        """Runs a function on a side stream, as it must have been before it is recorded."""
        stream, current = _side_stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                return function()
        finally:
            current.wait_stream(stream)  # also where a step was refused

    def record(self, function: Callable[[], Result]) -> Result:
        """Records what a function launches, and returns the tensors that a replay will fill.

        Raises LostCaptureError if the capture does not end in order, as where the function waits
        for the device, and what the function raises if it does.
        """
        stream, raised = _side_stream(self.device), []

        def run() -> Result:
            try:
                return function()
            except BaseException as error:
                raised.append(error)
                raise

        try:
            with (
                torch.cuda.device(self.device),
                # PyTorch's capture stays on its stream if it does not end in order
                torch.cuda.stream(stream),
                torch.cuda.graph(
                    self.graph,
                    stream=stream,
                    # what other threads do, such as one that pins the batches of a DataLoader, is
                    # no part of the capture and must not end it
                    capture_error_mode="thread_local",
                ),
            ):
                return run()
        except RuntimeError as error:
            if error in raised:
                raise
            first = raised[0] if raised else error
            raise LostCaptureError(
                f"the capture of a CUDA graph failed: {first}. What is captured must not read a "
                "value on the device, or do anything else that a graph cannot hold; mend it, and "
                "start a new process, since PyTorch may not capture again in this one"
            ) from first

    def fill(self, tensors: Sequence[Tensor], known: Collection[int]) -> None:
        """A replay fills all tensors that were made, these among them."""

    def is_current(self) -> bool:
        """Whether it is worth a replay. What a graph reads at an address is not known."""
        return True

    def replay(self) -> None:
        self.graph.replay()

    def handed_out(self, x: Tensor) -> Tensor:
        """A tensor for the caller, which later replays leave as it is."""
        return x.clone()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which steps warm up and are recorded, so that they share memory."""
    return torch.cuda.Stream(device)
