"""What the scripts in `benchmarks/` have in common: a command line, a run folder and a table.

A script lists cases, each of which measures some rows. The rows of a case are written to a run
folder at once, and so is the table of all that was measured, so that a run that was stopped has a
table and can be resumed.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.progress import print_plain, print_stopped, standard_console
from softsphere_lab.records.environment import gpu_name
from softsphere_lab.records.files import write
from softsphere_lab.records.folder import Record
from softsphere_lab.timing.failures import DeviceLostError
from softsphere_lab.timing.setting import Setting

__all__ = [
    "COLUMNS",
    "UNFINISHED",
    "Case",
    "Cells",
    "Row",
    "host",
    "left_out",
    "read_table",
    "reason_of",
    "run",
]

# The exit status of a command whose minutes are over before all is measured, as sysexits.h names a
# failure after which the same command may be given again.
UNFINISHED = 75
COLUMNS = ("layer", "D", "d", "m", "measure", "value", "machine", "torch", "threads")
MEASURED = "measured.jsonl"
TABLE = "table.csv"
# The beginning of the line in which Python names the exception that ended a process.
_NAMED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)\b")
Cells = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One number: of a layer, at a setting.

    again: whether its case is looked at again by --resume, as where a package was not installed.
    """

    layer: str
    setting: Setting
    measure: str
    value: float | str
    again: bool = False

    def cells(self) -> Cells:
        """Returns the row of a table, without the machine."""
        s, value = self.setting, self.value
        return {
            "layer": self.layer,
            "D": s.D,
            "d": s.d,
            "m": s.m,
            "measure": self.measure,
            "value": value if isinstance(value, str) else f"{value:.6g}",
        }


@dataclass(frozen=True)
class Case:
    """Part of a benchmark that is measured as a whole. name: unique within the benchmark."""

    name: str
    measure: Callable[[], Iterable[Row]]


Derived = Callable[[Sequence[Cells]], Iterable[Row]]


def host(device: str = "cpu") -> dict[str, Any]:
    """Returns the machine, the version of torch, and the number of threads.

    device: where it computes what is timed.
    """
    return {
        "machine": gpu_name(device) or f"{os.cpu_count()}-core {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def left_out(layer: str, setting: Setting, reason: str | Exception, *, again: bool = False) -> Row:
    """The row that says in a table why a layer was not measured.

    reason: in words, or the error of a process; see `reason_of`. again: as of a row.
    """
    said = reason if isinstance(reason, str) else reason_of(reason)
    return Row(layer, setting, "left out", said, again)


def reason_of(error: Exception) -> str:
    """Returns the line of the error of a process that names an exception, or its last line."""
    lines = str(error).strip().splitlines()
    named = [line for line in lines if _NAMED.match(line)]
    return (named or lines)[-1][:120]


def read_table(path: Path) -> list[dict[str, str]]:
    """Returns the rows of a table."""
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))


def run(
    script: str,
    description: str,
    cases: Callable[[argparse.Namespace], Sequence[Case]],
    add_options: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
    arguments: Sequence[str] | None = None,
    device: str = "cpu",
    derived: Derived = lambda rows: (),
    grows: tuple[str, ...] = (),
) -> int:
    """The command line of a script. Returns its exit code.

    cases: made from the options, of which `smoke` asks for tiny sizes. device: where it computes,
    unless the script has an option of that name.
    derived: what follows from the cells of all rows together, which the table has behind them.
    grows: the options whose lists may differ from one start in a folder to the next; the table has
    the cases of all of them.

    Exit codes: 0 when all is measured, `UNFINISHED` when the minutes were over before, 2 for an
    error, and 130 after Ctrl-C.
    """
    started = time.monotonic()
    path = Path(script)
    parser = _parser(path, description)
    add_options(parser)
    options = parser.parse_args(arguments)
    if options.smoke and options.record:
        parser.error("--record keeps real measurements; leave --smoke out")
    if options.resume and options.out is None:
        parser.error("--resume needs --out, the folder to go on in")
    device = getattr(options, "device", device)
    try:
        listed = cases(options)
        record = _opened(path.stem, options, device, grows)
        end = math.inf if options.minutes is None else started + 60 * options.minutes
        try:
            with record.alone():
                remaining = _measure(listed, record, device, derived, end)
        except KeyboardInterrupt:
            print_stopped(standard_console(), record.folder)
            return 130
    except LabError as error:
        print(f"{path.name}: error: {error}", file=sys.stderr)
        return 2
    table = record.folder / TABLE
    if remaining:
        print_plain(
            standard_console(),
            f"The {options.minutes:g} minutes are over, and {remaining} of {len(listed)} cases are "
            f"not measured. The same command with --resume --out {shlex.quote(str(record.folder))} "
            "measures them.",
        )
    elif options.record:
        kept = _committed(path, device)
        write(kept, table.read_text("utf-8"))
        table = kept
    print(f"Table: {table}")
    return UNFINISHED if remaining else 0


def _committed(script: Path, device: str) -> Path:
    """The table beside a script, of which processors and GPUs have one each."""
    end = "_on_gpu"
    of_gpu = torch.device(device).type != "cpu" and not script.stem.endswith(end)
    return script.with_name(f"{script.stem}{end if of_gpu else ''}.csv")


def _parser(path: Path, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=path.name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"run folder; default runs/TIME-{path.stem}"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="measure only what --out does not have yet, which is all of it if there is no --out",
    )
    parser.add_argument(
        "--minutes",
        type=_positive,
        metavar="N",
        help="begin no case after N minutes; --resume measures the others",
    )
    parser.add_argument(
        "--record",
        action="store_true",
        help="replace the table beside the script when this one is complete",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, which only show that it works"
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _opened(
    name: str, options: argparse.Namespace, device: str, grows: tuple[str, ...] = ()
) -> Record:
    """The run folder. Times of another machine, torch or number of threads have no place in it."""
    how = ("out", "resume", "record", "minutes")
    own = {k: v for k, v in vars(options).items() if k not in how}
    config = {"benchmark": name, **own, **host(device)}
    if options.resume and (options.out / "config.json").exists():
        return Record.reopen(options.out, config, grows, device=device)
    options.out = options.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    return Record.create(options.out, config, device=device)


def _measure(
    cases: Sequence[Case], record: Record, device: str, derived: Derived, end: float
) -> int:
    """Measures the cases that the record lacks, prints their rows, and writes the table.

    A case that has lost the device counts as measured, so that the next process passes it.

    end: the time after which no case is begun. Returns how many were not.
    """
    lines = {line["case"]: line for line in record.lines(MEASURED)}
    done = {name: line["rows"] for name, line in lines.items()}
    again = {name for name, line in lines.items() if line.get("again")}
    machine = host(device)  # asked for once, since a device that is lost may not say its name

    def written() -> list[Row]:
        """Writes the table, and returns what follows from its other rows."""
        rows = [row for measured in done.values() for row in measured]
        more = list(derived(rows))
        write(record.folder / TABLE, _table([*rows, *(row.cells() | machine for row in more)]))
        return more

    told = written()
    for number, case in enumerate(cases, 1):
        if case.name in done and case.name not in again:
            continue
        if time.monotonic() > end:
            return sum(each.name not in done for each in cases)
        print(f"[{number}/{len(cases)}] {case.name}", flush=True)
        rows, lost, look_again = [], None, False
        try:
            for row in case.measure():
                rows.append(row.cells() | machine)
                look_again |= row.again
                _print(row)
        except DeviceLostError as error:
            lost = LabError(f"{case.name}: {error}")
        record.add(MEASURED, [{"case": case.name, "rows": rows, "again": look_again}])
        done[case.name] = rows
        before, told = told, written()
        for row in told:
            if row not in before:
                _print(row)
        if lost:
            raise lost
    return 0


def _print(row: Row) -> None:
    cells = row.cells()
    print(f"  {cells['layer']:34s} {cells['measure']}: {cells['value']}", flush=True)


def _table(rows: Sequence[Cells]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
