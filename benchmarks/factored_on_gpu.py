"""How long does a training step of the factored layer take on a GPU, against softmax and others?

    python benchmarks/factored_on_gpu.py --out runs/factored --resume
    python benchmarks/factored_on_gpu.py --setting "D = 256,000, d = 2304, m = 8192"

Forward, backward and update, each layer in a process of its own; a layer that takes more than two
minutes is left out. The factored layer is timed as Python runs it, and captured as a CUDA graph.
Softmax in bfloat16 and in TF32 is timed as it is, compiled, captured, and both. A captured step
says how many graphs were captured and which share of the timed steps was replayed; if that is below
90 %, its time is that of another step, and it has no part in the ratios.

Without --setting all settings are measured; those that are measured one by one share a folder by
--resume --out FOLDER, which begins it where there is none. No layer is begun after --minutes, so
that a command takes less than eight; the same line measures what is missing.
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
from softsphere_lab.timing.gpu_steps import CAPTURED, ON_GPU, SOFTMAX_ON_GPU
from softsphere_lab.timing.processes import measure
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import FACTORED

SETTINGS = (
    Setting(D=793_471, d=512, m=200),
    Setting(D=1_000_000, d=128, m=4096),
    Setting(D=10_000_000, d=128, m=512),
    Setting(D=256_000, d=2304, m=8192),
)
OWN = (CAPTURED, FACTORED)
OTHERS = ("hierarchical softmax", "sampled softmax, 1024", "adaptive softmax")
FASTEST = "the fastest softmax"
MILLISECONDS, REPLAYED = "milliseconds", "share of steps replayed"
# The least share of replayed steps whose time is that of a captured step.
ENOUGH = 0.9
# From the start of the process, which imports PyTorch and compiles.
PATIENCE = 120.0
# With the last process the whole command takes less than eight.
MINUTES = 5.5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(name: str, setting: Setting, effort: Effort, device: str) -> Iterator[Row]:
    try:
        found = measure(name, setting, effort, device=device, patience=PATIENCE)
    except LabError as error:  # out of memory, or too slow
        yield left_out(name, setting, error)
        return
    yield Row(name, setting, MILLISECONDS, 1e3 * found.seconds)
    yield Row(name, setting, "mean milliseconds", 1e3 * found.mean)
    if found.captures is not None and found.replayed is not None:
        yield Row(name, setting, "graphs captured", found.captures)
        yield Row(name, setting, REPLAYED, found.replayed)


def ratios(rows: Sequence[Cells]) -> Iterator[Row]:
    """How many times the steps of the factored layer each other layer takes."""

    def at(row: Cells) -> Setting:
        return Setting(row["D"], row["d"], row["m"])

    for setting in dict.fromkeys(map(at, rows)):
        yield from _ratios(setting, [row for row in rows if at(row) == setting])


def _ratios(setting: Setting, rows: Sequence[Cells]) -> Iterator[Row]:
    times, shares = (
        {row["layer"]: float(row["value"]) for row in rows if row["measure"] == measure}
        for measure in (MILLISECONDS, REPLAYED)
    )
    for name, share in shares.items():
        if share < ENOUGH:
            del times[name]
            yield left_out(name, setting, f"no ratios: {share:.0%} of the steps were replayed")
    others = {name: taken for name, taken in times.items() if name not in OWN}
    # only once all of them are timed or left out
    softmax = {name: times[name] for name in SOFTMAX_ON_GPU if name in times}
    if softmax and {*SOFTMAX_ON_GPU} <= {row["layer"] for row in rows}:
        fastest = min(softmax, key=softmax.__getitem__)
        yield Row(FASTEST, setting, "is", fastest)
        others[FASTEST] = softmax[fastest]
    for name, milliseconds in others.items():
        for own in OWN:
            if own in times:
                yield Row(name, setting, f"times {own}", milliseconds / times[own])


def cases(options: argparse.Namespace) -> list[Case]:
    if DEVICE == "cpu" and not options.smoke:
        raise LabError("this benchmark needs a CUDA device, and PyTorch sees none")
    # a list, also in the record, which has the settings of all starts
    settings = (Setting(D=2_500, d=8, m=16),) if options.smoke else SETTINGS
    effort = Effort(0.05, 6, 1) if options.smoke else Effort(2.0, 12, 5)
    if options.setting is None or options.smoke:
        options.setting = [*map(str, settings)]
    settings = tuple(each for each in settings if str(each) in options.setting)
    return [
        Case(f"{setting}: {name}", partial(timed, name, setting, effort, DEVICE))
        for setting in settings
        for name in dict.fromkeys((*OWN, *ON_GPU, *OTHERS))
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(minutes=MINUTES)
    parser.add_argument(
        "--setting",
        choices=[*map(str, SETTINGS)],
        action="append",
        help="measure this one; may be repeated",
    )


if __name__ == "__main__":
    given = {"device": DEVICE, "derived": ratios, "grows": ("setting",)}
    sys.exit(run(__file__, __doc__, cases, add_options, **given))
