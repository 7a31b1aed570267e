"""How much memory do steps, mending, saving and loading of the factored layer take, in sizes of W?

    python benchmarks/factored_memory.py

The peak of the process is counted, beyond what it had after its imports; on Linux.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from softsphere_lab.timing.benchmark import Case, Row, run
from softsphere_lab.timing.memory import PeakMemory
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import FACTORED, factored


def peaks(setting: Setting) -> Iterator[Row]:
    peak, size = PeakMemory(), 4 * setting.D * setting.d
    step = factored(setting)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step(*setting.batch(generator))
    yield Row(FACTORED, setting, "peak over W, steps", peak.over(size))
    head = step.head
    for _ in range(20):
        head.matrix.renew_()
        step(*setting.batch(generator))
    head.matrix.refactorise_()
    yield Row(FACTORED, setting, "peak over W, and mending", peak.over(size))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        torch.save(head.state_dict(), path)
        yield Row(FACTORED, setting, "peak over W, and saving", peak.over(size))
        head.load_state_dict(torch.load(path, mmap=True))
        yield Row(FACTORED, setting, "peak over W, and loading", peak.over(size))


def cases(options: argparse.Namespace) -> list[Case]:
    setting = Setting(D=500, d=8, m=16) if options.smoke else Setting(D=2_000_000, d=256, m=128)
    return [Case(str(setting), partial(peaks, setting))]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
