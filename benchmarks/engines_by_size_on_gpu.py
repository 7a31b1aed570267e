"""Which engine of the linear layer is fastest at which size on a GPU, and does `auto` choose it?

    python benchmarks/engines_by_size_on_gpu.py --dtype bfloat16

Forward and backward, the engines in turn, beside a criterion on plain logits, as
`engines_by_size.py` does it on a processor. Without --dtype all sizes are measured in bfloat16 and
then in float32. An engine that raises an error at a size is left out there. A command that is
stopped, whose minutes are over, or that loses the device by an error of CUDA, leaves a table of
what it has measured, and goes on with --resume --out FOLDER. `machine_numbers.py` finds the numbers
by which `auto` should choose.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing.benchmark import Case, run
from softsphere_lab.timing.engines_in_turn import Place, compared
from softsphere_lab.timing.setting import Setting

CLASSES = (10_000, 50_000, 250_000, 1_000_000)
WIDTHS = (128, 768, 2304, 4096)
ROWS = (64, 512, 4096, 32_768)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def place(dtype: torch.dtype) -> Place:
    total = torch.cuda.mem_get_info()[1] if DEVICE == "cuda" else 14e9
    return Place(DEVICE, dtype, memory=0.8 * total, seconds=1, fewest=3, most=30)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(minutes=7.0)
    parser.add_argument("--dtype", choices=DTYPES, help="measure in this dtype alone")


def cases(options: argparse.Namespace) -> list[Case]:
    if DEVICE == "cpu" and not options.smoke:
        raise LabError("this benchmark needs a CUDA device, and PyTorch sees none")
    sizes = ((50,), (4, 8), (1, 16)) if options.smoke else (CLASSES, WIDTHS, ROWS)
    return [
        Case(f"{name}, {setting}", partial(compared, setting, place(dtype), f"{name}: "))
        for name, dtype in DTYPES.items()
        if options.dtype in (None, name)
        for setting in itertools.starmap(Setting, itertools.product(*sizes))
    ]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases, add_options, device=DEVICE))
