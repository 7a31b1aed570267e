"""How long does a training step of the factored layer take on a GPU, against softmax and others?

    python benchmarks/factored_on_gpu.py
    python benchmarks/factored_on_gpu.py --setting "D = 256,000, d = 2304, m = 8192"

Forward, backward and update, each layer in a process of its own; a layer that takes more than a
minute is left out. The factored layer is timed as Python runs it, and captured as a CUDA graph.
Without --setting all settings are measured, which may take more than ten minutes. A command that is
stopped leaves a table of what it has measured, and goes on with --resume --out FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing.benchmark import Case, Cells, Row, left_out, run
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.processes import measure
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import BFLOAT16_SOFTMAX, CAPTURED, FACTORED, ON_GPU

SETTINGS = (
    Setting(D=793_471, d=512, m=200),
    Setting(D=1_000_000, d=128, m=4096),
    Setting(D=10_000_000, d=128, m=512),
    Setting(D=256_000, d=2304, m=8192),
)
MILLISECONDS = "milliseconds"
OTHERS = ("hierarchical softmax", "sampled softmax, 1024", "adaptive softmax")
# From the start of the process, which imports PyTorch and compiles.
PATIENCE = 60.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(name: str, setting: Setting, effort: Effort, device: str) -> Iterator[Row]:
    try:
        found = measure(name, setting, effort, device=device, patience=PATIENCE)
    except LabError as error:  # out of memory, or too slow
        yield left_out(name, setting, error)
        return
    yield Row(name, setting, MILLISECONDS, 1e3 * found.seconds)


def ratios(rows: Sequence[Cells]) -> Iterator[Row]:
    """How many times the steps of the factored layer each other layer takes."""
    for setting in dict.fromkeys(Setting(row["D"], row["d"], row["m"]) for row in rows):
        times = {
            row["layer"]: float(row["value"])
            for row in rows
            if row["measure"] == MILLISECONDS and Setting(row["D"], row["d"], row["m"]) == setting
        }
        for name, milliseconds in times.items():
            for own in (CAPTURED, FACTORED):
                if own in times and name not in (CAPTURED, FACTORED):
                    yield Row(name, setting, f"times {own}", milliseconds / times[own])


def cases(options: argparse.Namespace) -> list[Case]:
    if options.smoke:
        settings, effort = (Setting(D=2_500, d=8, m=16),), Effort(0.05, 6, 1)
    elif DEVICE == "cpu":
        raise LabError("this benchmark needs a CUDA device, and PyTorch sees none")
    else:
        settings = tuple(each for each in SETTINGS if options.setting in (None, str(each)))
        effort = Effort(2.0, 12, 5)
    return [
        Case(f"{setting}: {name}", partial(timed, name, setting, effort, DEVICE))
        for setting in settings
        for name in dict.fromkeys((CAPTURED, FACTORED, BFLOAT16_SOFTMAX, *ON_GPU, *OTHERS))
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setting", choices=[*map(str, SETTINGS)], help="measure this one alone")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases, add_options, device=DEVICE, derived=ratios))
