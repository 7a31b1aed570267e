"""How many times longer than the factored layer does each other output layer take to train a step?

    python benchmarks/factored_vs_other_layers.py

The settings are the papers'. Everything is counted: forward, backward, update, and the factored
layer's mending. Each layer is timed in a process of its own. How the times grow with the number of
classes is an experiment: `softsphere reproduce scaling`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from softsphere_lab.timing.benchmark import Case, Row, left_out, run
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.processes import measure
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import (
    CHUNKED,
    CORE,
    FACTORED,
    LAYERS,
    REPEATED,
    obstacle,
)

# the steps after which the compiled one is the program that it stays
WARM_UP = 40
SETTINGS = (Setting(D=793_471, d=512, m=200), Setting(D=800_000, d=300, m=128))


def compared(setting: Setting, effort: Effort) -> Iterator[Row]:
    ours = measure(FACTORED, setting, effort).seconds
    yield Row(FACTORED, setting, "seconds", ours)
    for name in REPEATED:
        seconds = measure(name, setting, replace(effort, warm_up=WARM_UP)).seconds
        yield Row(name, setting, "seconds", seconds)
        yield Row(name, setting, "times ours", seconds / ours)
    for name in LAYERS:
        if name == FACTORED:
            continue
        reason = obstacle(name, setting)
        if reason is not None:
            yield left_out(name, setting, reason)
            continue
        # of PyTorch's fused softmax the best chunk counts
        ways = CHUNKED if name == CORE else (name,)
        seconds, way = min((measure(way, setting, effort).seconds, way) for way in ways)
        yield Row(way, setting, "seconds", seconds)
        yield Row(way, setting, "times ours", seconds / ours)


def cases(options: argparse.Namespace) -> list[Case]:
    if options.smoke:
        small = Setting(D=2_500, d=8, m=16)
        return [Case(str(small), partial(compared, small, Effort(0.05, 1, 1)))]
    return [Case(str(setting), partial(compared, setting, Effort())) for setting in SETTINGS]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
