"""`softsphere reproduce`: one of the paper's experiments, at one of three budgets."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from softsphere_lab.cli.arguments import DataDir, Device, Resume, at_least_one, folder, usable
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.experiment import BUDGETS, Experiment, Prepared
from softsphere_lab.experiments.page import RECORDS, put
from softsphere_lab.experiments.registry import EXPERIMENTS
from softsphere_lab.progress import tell_stopped, terminal
from softsphere_lab.records.folder import Record

__all__ = ["reproduce"]


def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help=f"One of {', '.join(EXPERIMENTS)}.")
    ] = "",
    budget: Annotated[
        str, typer.Option(help=f"{', '.join(BUDGETS)}: under a minute, less than all, all of it.")
    ] = "small",
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=folder, metavar="FOLDER", help="Run folder; default records/DATE-NAME-BUDGET."
        ),
    ] = None,
    resume: Resume = False,
    jobs: Annotated[int, typer.Option(help="Processes, each with its share of the cores.")] = 1,
) -> None:
    """Run one of the paper's experiments again, and tell what came beside what it reports."""
    if name not in EXPERIMENTS:
        raise LabError(f"NAME must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    if budget not in BUDGETS:
        raise LabError(f"--budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    experiment = EXPERIMENTS[name]
    if experiment.timed and jobs > 1:
        raise LabError(f"--jobs must be 1 for {name}, whose steps are timed one by one, got {jobs}")
    at_least_one("--jobs", jobs, max(1, os.cpu_count() or 1))
    if budget == "smoke" and data_dir is not None:
        raise LabError("--data-dir has no meaning with --budget smoke, whose data is built in")
    # each process has its share of the cores, as the record will say
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    prepared = experiment.prepare(budget, usable(device), data_dir)
    record = opened(experiment.name, budget, prepared, out, resume)
    console = terminal()
    try:
        with record.alone():
            prepared.run(record, console, jobs)
    except KeyboardInterrupt:
        tell(experiment, record, console)
        tell_stopped(console, record.folder)
        raise typer.Exit(130) from None
    tell(experiment, record, console)


def opened(name: str, budget: str, prepared: Prepared, out: Path | None, resume: bool) -> Record:
    """A new run folder, or the one that is gone on with."""
    ending = name if budget == "full" else f"{name}-{budget}"
    if not resume:
        return Record.create(
            out or RECORDS / f"{time.strftime('%Y-%m-%d')}-{ending}", prepared.config
        )
    if out is None:
        folders = sorted(RECORDS.glob(f"*-{ending}"), reverse=True)
        matching = (f for f in folders if Record(f).matches(prepared.config, prepared.grows))
        out = next(matching, None)
        if out is None:
            raise LabError(
                f"--resume: no folder {RECORDS}/*-{ending} was made with these options; leave "
                "--resume out to begin one, or name it with --out"
            )
    return Record.reopen(out, prepared.config, prepared.grows)


def tell(experiment: Experiment, record: Record, console: Console) -> None:
    """The section of what is finished: in the run folder, and in the terminal in short."""
    section = experiment.section(record)
    if section is None:
        console.print("No run is finished yet.")
        return
    _, *pictures = put(record, section)
    if console.is_terminal:
        console.print(Markdown(section.table))
    else:
        console.print(section.table, markup=False, highlight=False, soft_wrap=True)
    for line in filter(None, (experiment.finished(record), section.finding)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for picture in pictures:
        console.print(f"Picture: {picture}", markup=False, highlight=False, soft_wrap=True)
