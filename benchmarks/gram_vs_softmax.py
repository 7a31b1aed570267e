"""How many times longer does softmax take than the Gram engine, and in how much memory?

    python benchmarks/gram_vs_softmax.py

Forward and backward in float32, each in a process of its own, beside all of PyTorch's ways to a
softmax. Softmax is waited for 90 seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial

from softsphere_lab.timing.benchmark import Case, Row, left_out, run
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.processes import FORWARD_BACKWARD, TookTooLongError, measure
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.softmax_peers import SOFTMAX

SETTINGS = (
    Setting(D=100_000, d=512, m=2048),
    Setting(D=262_144, d=256, m=1024),
    Setting(D=1_000_000, d=64, m=1024),
    Setting(D=262_144, d=256, m=4096),
)
EFFORT = Effort(seconds=8, warm_up=1, fewest=1, most=15)
PATIENCE = 90


def compared(setting: Setting, effort: Effort) -> Iterator[Row]:
    gram = measure("gram", setting, effort, kind=FORWARD_BACKWARD)
    yield Row("gram", setting, "seconds", gram.seconds)
    extra = gram.extra_bytes / (4 * setting.m * setting.D)
    yield Row("gram", setting, "extra memory in sizes of the logits", extra)
    best = math.inf
    for name, peer in SOFTMAX.items():
        missing = peer.missing()
        if missing:
            yield left_out(name, setting, missing)
            continue
        try:
            seconds = measure(
                name, setting, effort, kind=FORWARD_BACKWARD, patience=PATIENCE
            ).seconds
        except TookTooLongError:
            yield left_out(name, setting, f"it takes more than {PATIENCE} seconds")
            continue
        best = min(best, seconds)
        yield Row(name, setting, "seconds", seconds)
    yield Row("gram", setting, "times faster than the best", best / gram.seconds)


def cases(options: argparse.Namespace) -> list[Case]:
    if options.smoke:
        small = Setting(D=500, d=8, m=32)
        return [Case(str(small), partial(compared, small, Effort(0.05, 1, 1, 15)))]
    return [Case(str(setting), partial(compared, setting, EFFORT)) for setting in SETTINGS]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
