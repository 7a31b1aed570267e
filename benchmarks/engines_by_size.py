"""Which engine of the linear layer is fastest at which size, and does `auto` choose it?

    python benchmarks/engines_by_size.py

Forward and backward in float32, the engines in turn, beside a criterion on plain logits. Each size
takes seconds to minutes; --resume goes on after the last size that was measured.
`python benchmarks/engines_page.py` makes docs/engines.md of the table.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial

import torch

from softsphere_lab.timing.benchmark import Case, run
from softsphere_lab.timing.engines_in_turn import Place, compared
from softsphere_lab.timing.setting import Setting

CLASSES = (100, 10_000, 100_000, 1_000_000)
WIDTHS = (64, 256, 768)
ROWS = (1, 16, 64, 256, 1024, 4096)
PLACE = Place("cpu", torch.float32, memory=14e9, seconds=4, fewest=9, most=60)


def cases(options: argparse.Namespace) -> list[Case]:
    sizes = ((50,), (4, 8), (1, 16)) if options.smoke else (CLASSES, WIDTHS, ROWS)
    settings = [Setting(*size) for size in itertools.product(*sizes)]
    return [Case(str(setting), partial(compared, setting, PLACE)) for setting in settings]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
