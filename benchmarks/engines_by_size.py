"""Which engine of the linear layer is fastest at which size, and does `auto` choose it?

    python benchmarks/engines_by_size.py

Forward and backward in float32, the engines in turn, beside a criterion on plain logits. Each size
takes seconds to minutes; --resume goes on after the last size that was measured.
`python benchmarks/engines_page.py` makes docs/engines.md of the table.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from functools import partial

import torch

from softsphere.engines import choose
from softsphere_lab.timing.benchmark import Case, Row, run
from softsphere_lab.timing.clock import in_turn
from softsphere_lab.timing.linear_losses import ENGINES, LOSSES, ForwardBackward
from softsphere_lab.timing.setting import Setting

# An engine is not timed where it has so many times the FLOPs of another.
HOPELESS = 6
CLASSES = (100, 10_000, 100_000, 1_000_000)
WIDTHS = (64, 256, 768)
ROWS = (1, 16, 64, 256, 1024, 4096)


def flops(setting: Setting) -> dict[str, float]:
    m, D, d = setting.m, setting.D, setting.d
    gram = 4 * (D + m) * d * d
    return {"dense": 6 * m * D * d, "logits": 6 * m * D * d, "chunked": 8 * m * D * d, "gram": gram}


def contestants(setting: Setting) -> list[str]:
    """Those that fit in memory and have a chance of being the fastest, and auto."""
    least = min(flops(setting).values())
    fits = 3 * 4 * setting.m * setting.D + 12 * setting.D * setting.d < 14e9
    names = []
    for name, count in flops(setting).items():
        hopeful = count < HOPELESS * least or count < 2e9
        if hopeful and (fits or name not in ("dense", "logits")):
            names.append(name)
    return [*names, "auto"]


def turns_for(contestants: int, longest: float) -> int:
    """So many turns that all of them take some four seconds, but 9 at least and 60 at most."""
    return max(9, min(60, int(4 / longest / contestants)))


def compared(setting: Setting) -> Iterator[Row]:
    names = contestants(setting)
    torch.manual_seed(0)
    # one weight for all, since several would not fit
    step = ForwardBackward(LOSSES["logits"](), setting)
    batch = setting.batch(torch.Generator().manual_seed(0))
    losses = {name: LOSSES[name]() for name in names}

    def taken_by(name: str) -> None:
        step.loss = losses[name]
        step(*batch)

    runs = {name: partial(taken_by, name) for name in names}
    times = in_turn(runs, partial(turns_for, len(names)))
    median = {name: statistics.median(taken) for name, taken in times.items()}
    for name, seconds in median.items():
        yield Row(name, setting, "seconds", seconds)
    fastest = min((name for name in median if name in ENGINES), key=median.__getitem__)
    chosen = choose(setting.m, setting.D, setting.d, torch.float32, "cpu").engine
    yield Row("auto", setting, "is", chosen)
    yield Row("best", setting, "is", fastest)
    yield Row("auto", setting, "times the best engine", median["auto"] / median[fastest])
    if "logits" in median:
        yield Row("auto", setting, "times plain logits", median["auto"] / median["logits"])


def cases(options: argparse.Namespace) -> list[Case]:
    sizes = ((50,), (4, 8), (1, 16)) if options.smoke else (CLASSES, WIDTHS, ROWS)
    settings = [Setting(*size) for size in itertools.product(*sizes)]
    return [Case(str(setting), partial(compared, setting)) for setting in settings]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
