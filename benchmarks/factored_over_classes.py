"""How much longer is a step of the factored layer at ten million classes than at ten thousand?

    python benchmarks/factored_over_classes.py

Each of three pairs is timed one after the other, in processes of their own; the ratio is the median
of theirs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from functools import partial

from softsphere_lab.timing.benchmark import Case, Row, run
from softsphere_lab.timing.clock import Effort, paired_ratio
from softsphere_lab.timing.processes import measure
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import FACTORED

PAIRS = 3


def compared(few: Setting, many: Setting, effort: Effort) -> Iterator[Row]:
    pairs = [[measure(FACTORED, s, effort).seconds for s in (few, many)] for _ in range(PAIRS)]
    of_few, of_many = map(list, zip(*pairs, strict=True))
    yield Row(FACTORED, few, "seconds", statistics.median(of_few))
    yield Row(FACTORED, many, "seconds", statistics.median(of_many))
    yield Row(FACTORED, many, f"times that at D = {few.D:,}", paired_ratio(of_many, of_few))


def cases(options: argparse.Namespace) -> list[Case]:
    few, many = (Setting(D=D, d=128, m=128) for D in (10_000, 10_000_000))
    effort = Effort()
    if options.smoke:
        few, many = (Setting(D=D, d=8, m=16) for D in (100, 2_500))
        effort = Effort(0.05, 1, 1)
    return [Case(f"D = {few.D:,} and D = {many.D:,}", partial(compared, few, many, effort))]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
