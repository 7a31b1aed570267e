"""How many times longer is a step of the factored layer than the matrix products that it needs?

    python benchmarks/factored_vs_its_products.py

Those are seven products of m d² and four of m² d.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from softsphere_lab.timing.benchmark import Case, Row, run
from softsphere_lab.timing.clock import in_turn, paired_ratio
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import FACTORED, REPEATED, factored, products

SETTINGS = (Setting(D=793_471, d=512, m=200), Setting(D=800_000, d=300, m=128))
STEPS: Mapping[str, Callable[[Setting], Any]] = {FACTORED: factored, **REPEATED}
# after so many steps the compiled one is the program that it stays
WARM_UP, TURNS, PRODUCTS = 40, 60, "its products alone"


def compared(setting: Setting) -> Iterator[Row]:
    for name, make in STEPS.items():
        yield from _beside_products(name, make(setting), setting)


def _beside_products(name: str, step: Callable[..., Any], setting: Setting) -> Iterator[Row]:
    multiply, generator = products(setting), torch.Generator().manual_seed(0)
    once = setting.batch(generator)
    for _ in range(WARM_UP):
        step(*setting.batch(generator))
    # drawn outside the clock; one for the warm-up
    batches = iter([setting.batch(generator) for _ in range(TURNS + 1)])
    alone = f"{PRODUCTS}, beside {name}"
    times = in_turn({name: lambda: step(*next(batches)), alone: lambda: multiply(*once)}, TURNS)
    for each, taken in times.items():
        yield Row(each, setting, "milliseconds", 1e3 * statistics.median(taken))
    yield Row(name, setting, "times its products", paired_ratio(times[name], times[alone]))


def cases(options: argparse.Namespace) -> list[Case]:
    settings = (Setting(D=500, d=8, m=16),) if options.smoke else SETTINGS
    return [Case(str(setting), partial(compared, setting)) for setting in settings]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
