"""How long does a training step of the factored layer take on a GPU, against softmax and others?

    python benchmarks/factored_on_gpu.py
    python benchmarks/factored_on_gpu.py --setting "D = 256,000, d = 2304, m = 8192"

Forward, backward and update, each layer in a process of its own; a layer that takes more than a
minute and a half is left out. The factored layer is timed as Python runs it, and captured as a CUDA
graph. Without --setting all settings are measured, which may take more than ten minutes. A command
that is stopped goes on with --resume --out FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing.benchmark import Case, Row, left_out, run
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
OTHERS = ("hierarchical softmax", "sampled softmax, 1024", "adaptive softmax")
# From the start of the process, which imports PyTorch and compiles.
PATIENCE = 90.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compared(setting: Setting, effort: Effort, device: str) -> Iterator[Row]:
    """Each layer in milliseconds, and in times both steps of the factored one."""
    ours: dict[str, float] = {}
    for name in dict.fromkeys((CAPTURED, FACTORED, BFLOAT16_SOFTMAX, *ON_GPU, *OTHERS)):
        try:
            found = measure(name, setting, effort, device=device, patience=PATIENCE)
        except LabError as error:  # out of memory, or too slow
            yield left_out(name, setting, str(error).strip().splitlines()[-1][:120])
            continue
        yield Row(name, setting, "milliseconds", 1e3 * found.seconds)
        if name in (CAPTURED, FACTORED):
            ours[name] = found.seconds
            continue
        for own, seconds in ours.items():
            yield Row(name, setting, f"times {own}", found.seconds / seconds)


def cases(options: argparse.Namespace) -> list[Case]:
    if options.smoke:
        small = Setting(D=2_500, d=8, m=16)
        return [Case(str(small), partial(compared, small, Effort(0.05, 6, 1), DEVICE))]
    if DEVICE == "cpu":
        raise LabError("this benchmark needs a CUDA device, and PyTorch sees none")
    return [
        Case(str(setting), partial(compared, setting, Effort(2.0, 12, 5), DEVICE))
        for setting in SETTINGS
        if options.setting in (None, str(setting))
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setting", choices=[*map(str, SETTINGS)], help="measure this one alone")


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases, add_options, device=DEVICE))
