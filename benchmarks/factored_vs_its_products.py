"""How many times longer is a step of the factored layer than the matrix products that it needs?

    python benchmarks/factored_vs_its_products.py

Those are seven products of m d² and four of m² d.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from functools import partial

import torch

from softsphere_lab.timing.benchmark import Case, Row, run
from softsphere_lab.timing.clock import in_turn, paired_ratio
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import FACTORED, factored, products

SETTINGS = (Setting(D=793_471, d=512, m=200), Setting(D=800_000, d=300, m=128))
TURNS, PRODUCTS = 60, "its products alone"


def compared(setting: Setting) -> Iterator[Row]:
    step, multiply = factored(setting), products(setting)
    generator = torch.Generator().manual_seed(0)
    once = setting.batch(generator)
    for _ in range(10):
        step(*setting.batch(generator))
    # drawn outside the clock; one for the warm-up
    batches = iter([setting.batch(generator) for _ in range(TURNS + 1)])
    times = in_turn(
        {FACTORED: lambda: step(*next(batches)), PRODUCTS: lambda: multiply(*once)}, TURNS
    )
    for name, taken in times.items():
        yield Row(name, setting, "milliseconds", 1e3 * statistics.median(taken))
    ratio = paired_ratio(times[FACTORED], times[PRODUCTS])
    yield Row(FACTORED, setting, "times its products", ratio)


def cases(options: argparse.Namespace) -> list[Case]:
    settings = (Setting(D=500, d=8, m=16),) if options.smoke else SETTINGS
    return [Case(str(setting), partial(compared, setting)) for setting in settings]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
