"""What the benchmarks share: clocks, memory, and tables whose parts are replaced one by one."""

from __future__ import annotations

import csv
import io
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["Peak", "extra_bytes", "host", "read", "record", "seconds", "wait"]


def wait(device: torch.device | str) -> None:
    """Until a GPU has done what it was asked for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def extra_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak allocation while it runs, from the allocator's own events or statistics."""
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


class Peak(threading.Thread):
    """The most memory of its own that this process has had, beyond that at the start.

    Pages of a file that is mapped, which the system may drop at any time, are not counted.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = anonymous_bytes()
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.002)

    def over(self, size: int) -> float:
        return (self.most - self.before) / size


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def host() -> dict[str, Any]:
    """Machine and versions, in every row."""
    on_gpu = torch.cuda.is_available()
    processor = f"{os.cpu_count()}-core {platform.machine()}"
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else processor,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def read(table: Path) -> list[dict[str, str]]:
    """The rows of a table, if there is one."""
    return list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []


def record(table: Path, part: str, rows: list[dict[str, Any]]) -> None:
    """Replaces a part's rows in a table, which is written at once."""
    old = read(table)
    new = [{"part": part, **row, **host()} for row in rows]
    kept = [row for row in old if row["part"] != part] + new
    text = io.StringIO()
    writer = csv.DictWriter(text, list(new[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    table.write_text(text.getvalue())
