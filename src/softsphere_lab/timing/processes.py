"""Seconds of an output layer's training step, each layer in a process of its own.

What one layer leaves in the allocator and the caches is then nothing to the next. The process is
`python -m softsphere_lab.timing.processes JSON`, which prints the median.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing.layers import LAYERS, Setting, Step, core

__all__ = ["SECONDS", "measure", "timed"]

WARM_UP, FEWEST, MOST = 3, 5, 500
SECONDS = 12.0


def timed(step: Step, setting: Setting, seconds: float = SECONDS) -> list[float]:
    """Times of steps after warm-up: for so many seconds, but FEWEST at least and MOST at most."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(WARM_UP):
        step(*setting.batch(generator))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST or (time.perf_counter() < end and len(times) < MOST):
        batch = setting.batch(generator)
        start = time.perf_counter()
        step(*batch)
        times.append(time.perf_counter() - start)
    return times


def measure(
    name: str, setting: Setting, chunk: int | None = None, seconds: float = SECONDS
) -> float:
    """Median seconds of a step of LAYERS[name], in a process of its own with as many threads.

    chunk: rows at a time of core's fused softmax, which is then what is measured.
    Raises: LabError with what the process said where it failed.
    """
    job = {
        "layer": name,
        "setting": asdict(setting),
        "chunk": chunk,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "softsphere_lab.timing.processes", json.dumps(job)]
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as wrong,
        # whose end, which comes with that of this process, is the end of the other one too
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=wrong) as process,
    ):
        status = process.wait()
        out.seek(0)
        wrong.seek(0)
        if status:
            said = wrong.read().strip()[-2000:] or f"exit status {status}"
            raise LabError(f"{name} at {setting} failed:\n{said}")
        return float(out.read().split()[-1])


def leave_with_parent() -> None:
    """Waits for the end of standard input, and leaves at once."""
    sys.stdin.read()
    os._exit(1)


def main(job: str) -> None:
    """What the process does."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    asked = json.loads(job)
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    setting = Setting(**asked["setting"])
    chunk = asked["chunk"]
    step = core(setting, chunk) if chunk else LAYERS[asked["layer"]](setting)
    print(statistics.median(timed(step, setting, asked["seconds"])))


if __name__ == "__main__":
    main(sys.argv[1])
