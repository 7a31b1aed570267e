"""Does a step of the factored layer stay as fast over ten thousand steps, mending included?

    python benchmarks/factored_wear.py

The loss is the squared error, which wears the factors out fastest, on hidden rows whose columns
have different sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch

from softsphere_lab.timing.benchmark import Case, Row, run
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import factored

LAYER = "factored squared error"


def worn(setting: Setting, parts: int, steps: int, name: str) -> Iterator[Row]:
    """Times parts of so many steps each. name: what a part is called."""
    step = factored(setting, "squared_error")
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1, setting.d)
    step(*setting.batch(generator))  # the first step makes Q from W
    taken = []
    for part in range(parts):
        start = time.perf_counter()
        for _ in range(steps):
            hidden, target = setting.batch(generator)
            step(hidden.detach().mul_(scale).requires_grad_(), target)
        taken.append(1e3 * (time.perf_counter() - start) / steps)
        print(f"  {part + 1} of {parts}: {taken[-1]:.2f} ms a step", flush=True)
    health = step.head.health(1)
    numbers = {
        f"milliseconds, first {name}": taken[0],
        f"milliseconds, slowest {name}": max(taken),
        "slowest over first": max(taken) / taken[0],
        "renewed": health.renewed,
        "refactorised": health.refactorised,
        "drift of Q at the end": health.gram_drift,
        "seconds of mending": health.seconds,
        "condition at the end": health.condition,
    }
    for measure, value in numbers.items():
        yield Row(LAYER, setting, measure, value)


def cases(options: argparse.Namespace) -> list[Case]:
    setting, parts, steps, name = Setting(D=793_471, d=512, m=200), 10, 1000, "thousand"
    if options.smoke:
        setting, parts, steps, name = Setting(D=500, d=8, m=16), 2, 5, "part"
    return [Case(str(setting), partial(worn, setting, parts, steps, name))]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
