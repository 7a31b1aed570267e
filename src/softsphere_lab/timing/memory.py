"""Bytes: those that one call allocates at its peak, and those that a process ever had."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["PeakMemory", "extra_bytes"]


def extra_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Returns the peak of what a call allocates beyond what was there before.

    It is counted from the allocator's own events on a CPU, and from its statistics on a GPU.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class PeakMemory(threading.Thread):
    """Watches the memory of this process from a thread, on Linux.

    Pages of a mapped file are not counted, since the system may drop them at any time.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = _anonymous_bytes()
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, _anonymous_bytes())
            time.sleep(0.002)

    def over(self, size: int) -> float:
        """Returns the peak beyond the bytes at the start, in multiples of `size`."""
        return (self.most - self.before) / size


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])
