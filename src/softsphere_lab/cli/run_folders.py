"""The one way in which commands open a run folder, fill it, and report what it has."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from softsphere_lab.ctrl_c import raise_interrupts
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.experiment import Prepared
from softsphere_lab.experiments.page import SMOKE, Report, report_of
from softsphere_lab.progress import print_plain, print_stopped, standard_console
from softsphere_lab.records.folder import Record
from softsphere_lab.report.grids import terminal_table

__all__ = ["AlsoReport", "Place", "run_and_report"]

# Reports a run folder in one more way.
AlsoReport = Callable[[Record, Console], None]


@dataclass(frozen=True)
class Place:
    """Where the run folders of a command are: `parent`/TIME-`ending`. stamp: the form of TIME."""

    parent: Path
    stamp: str
    ending: str

    @classmethod
    def of_command(cls, ending: str) -> Place:
        """Returns where a command has its runs that are no records.

        The ending may have the name of a dataset, which can be that of a folder in a folder.
        """
        return cls(Path("runs"), "%Y%m%d-%H%M%S", re.sub(r"[^\w.-]", "-", ending))

    def new(self) -> Path:
        """Returns the folder of a run that begins now."""
        return self.parent / f"{time.strftime(self.stamp)}-{self.ending}"

    def newest(self, prepared: Prepared) -> Path:
        """Returns the newest folder that was made with the same options."""
        pattern = f"*-{self.ending}"
        for folder in sorted(self.parent.glob(pattern), reverse=True):
            if Record(folder).matches(prepared.config, prepared.grows):
                return folder
        raise LabError(
            f"--resume: no folder {self.parent}/{pattern} was made with these options; leave "
            "--resume out to begin one, or name it with --out"
        )


def run_and_report(
    prepared: Prepared,
    place: Place,
    out: Path | None,
    resume: bool,
    jobs: int = 1,
    also: AlsoReport = lambda record, console: None,
) -> None:
    """Does what a run folder lacks, and reports what it has, also after a Ctrl-C.

    also: reports the folder in one more way.
    """
    record, prepared = _open_record(prepared, place, out, resume)
    console = standard_console()
    raise_interrupts()

    def work() -> None:
        with record.alone():
            prepared.run(record, console, jobs)

    def tell() -> None:
        _report_record(record, console)
        also(record, console)

    # A report can take long as well, and a second Ctrl-C stops it.
    stopped = [_is_stopped(part) for part in (work, tell)]
    if any(stopped):
        print_stopped(console, record.folder)
        raise typer.Exit(130)


def _is_stopped(part: Callable[[], None]) -> bool:
    """Does a part of the work. Returns whether a Ctrl-C stopped it."""
    try:
        part()
    except KeyboardInterrupt:
        return True
    return False


def _open_record(
    prepared: Prepared, place: Place, out: Path | None, resume: bool
) -> tuple[Record, Prepared]:
    """Returns a new run folder or the one that is resumed, and the experiment in its spelling."""
    if not resume:
        where = prepared.nproc, prepared.device
        return Record.create(out or place.new(), prepared.config, *where), prepared
    folder = out or place.newest(prepared)
    if prepared.spelled_as is not None:
        prepared = prepared.spelled_as(Record(folder).config() or {})
    config, grows = prepared.config, prepared.grows
    return Record.reopen(folder, config, grows, prepared.nproc, prepared.device), prepared


def _report_record(record: Record, console: Console) -> None:
    """Writes the README and the pictures, and prints the table and what was found."""
    found = report_of(record)
    if found is None:
        console.print("No run is finished yet.")
        return
    found.put()
    _print_report(found, console)


def _print_report(found: Report, console: Console) -> None:
    """Prints the table, what its signs mean, what was found, and where the pictures are."""
    section = found.section
    if console.is_terminal:
        console.print(terminal_table(section.table, console.width))
    else:
        print_plain(console, section.table)
    unfinished = found.experiment.unfinished(found.record)
    smoke = SMOKE if found.is_smoke else ""
    for line in filter(None, (section.note, unfinished, smoke)):
        print_plain(console, line)
    for picture in found.pictures.values():
        print_plain(console, f"Picture: {picture}")
    print_plain(console, section.finding)
