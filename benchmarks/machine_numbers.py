"""Which numbers of `softsphere.engines.machines` would explain a table of measured engines?

    python benchmarks/machine_numbers.py benchmarks/engines_by_size.csv

It measures nothing. For each dtype of a table of `engines_by_size.py` or of
`engines_by_size_on_gpu.py` it prints the numbers that the library has and those that fit the times
best, and how long the engines take that each of them would choose, in times of the best engine. It
needs SciPy: `pip install '.[clusters]'`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from softsphere.engines.engine import Workload
from softsphere.engines.machines import Machine, machine
from softsphere_lab.errors import LabError
from softsphere_lab.timing.benchmark import read_table
from softsphere_lab.timing.linear_losses import ENGINES
from softsphere_lab.timing.machine_fit import Times, choices, fitted


def times_of(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, torch.dtype], Times]:
    """The seconds of the engines in a table, by device and dtype; float32 where none is named."""
    found: dict[tuple[str, torch.dtype], dict[Workload, dict[str, float]]] = {}
    for row in rows:
        dtype, _, engine = row["layer"].rpartition(": ")
        if row["measure"] != "seconds" or engine not in ENGINES:
            continue
        place = _device(row["machine"]), getattr(torch, dtype or "float32")
        sizes = (int(row[name]) for name in ("m", "D", "d"))
        work = Workload(*sizes, K=1, bias=0, dtype=place[1], device=place[0])
        found.setdefault(place, {}).setdefault(work, {})[engine] = float(row["value"])
    return found


def _device(machine: str) -> str:
    """The kind of a machine: a processor says how many cores it has."""
    return "cpu" if re.match(r"\d+-core ", machine) else "cuda"


def table_of(device: str, dtype: torch.dtype, times: Times) -> Table:
    table = Table(title=f"{device}, {str(dtype).removeprefix('torch.')}, {len(times)} sizes")
    names = ("output", "input", "number", "overhead")
    for name in ("", *names, "TFLOP/s", "least ms", "error", "mean / best", "worst / best", "at"):
        table.add_column(name, justify="right")

    def add(said: str, on: Machine, *how: str) -> None:
        chosen = choices(times, on)
        numbers = (f"{getattr(on, name):.3g}" for name in names)
        at = f"m = {chosen.at.m}, D = {chosen.at.D:,}, d = {chosen.at.d}"
        table.add_row(said, *numbers, *how, f"{chosen.mean:.3f}", f"{chosen.worst:.2f}", at)

    present = machine(device, dtype)
    add("machines.py", present, "–", "–", "–")
    best = fitted(times, present)
    add(
        "fitted",
        best.machine,
        f"{best.rate / 1e12:.3g}",
        f"{1e3 * best.least:.3g}",
        f"{best.error:.0%}",
    )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, nargs="+", help="a table of seconds, as CSV")
    console = Console(width=140)
    for path in parser.parse_args(arguments).table:
        try:
            by_place = times_of(read_table(path))
        except (OSError, KeyError, ValueError, AttributeError) as error:
            parser.error(f"{path} cannot be read as a table of engines: {error}")
        if not by_place:
            parser.error(f"{path} has no seconds of {', '.join(ENGINES)}")
        for (device, dtype), times in by_place.items():
            try:
                console.print(table_of(device, dtype, times))
            except LabError as error:
                parser.error(f"{path}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
