"""How many times longer is a step of the factored layer than the matrix products that it needs?

    python benchmarks/factored_vs_its_products.py

Those are seven products of m d² (H Q, V_t U, U Lᵀ, (U Lᵀ) R, R U⁻¹, Lᵀ N, Rᵀ Z) and five of m² d.
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
from softsphere_lab.timing.training_steps import FACTORED, factored

SETTINGS = (Setting(D=793_471, d=512, m=200), Setting(D=800_000, d=300, m=128))
TURNS, PRODUCTS = 60, "its products alone"


def compared(setting: Setting) -> Iterator[Row]:
    m, d = setting.m, setting.d
    H, Q, K = torch.randn(m, d), torch.randn(d, d), torch.randn(m, m)

    def products() -> None:
        H @ Q, H @ Q, Q @ H.T, H @ Q
        H.T @ H, H.T @ H, H.T @ H
        H @ H.T, H @ H.T, H @ H.T, K @ H, K @ H

    step = factored(setting)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        step(*setting.batch(generator))
    # drawn outside the clock; one for the warm-up
    batches = iter([setting.batch(generator) for _ in range(TURNS + 1)])
    times = in_turn({FACTORED: lambda: step(*next(batches)), PRODUCTS: products}, TURNS)
    for name, taken in times.items():
        yield Row(name, setting, "milliseconds", 1e3 * statistics.median(taken))
    ratio = paired_ratio(times[FACTORED], times[PRODUCTS])
    yield Row(FACTORED, setting, "times its products", ratio)


def cases(options: argparse.Namespace) -> list[Case]:
    settings = (Setting(D=500, d=8, m=16),) if options.smoke else SETTINGS
    return [Case(str(setting), partial(compared, setting)) for setting in settings]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
