"""`softsphere reproduce`: one of the experiments, at one of three budgets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from softsphere_lab.cli.arguments import DataDir, Device, Resume, at_least_one, folder, usable
from softsphere_lab.cli.run_folders import Place, run_and_report
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.experiment import BUDGETS
from softsphere_lab.experiments.page import RECORDS
from softsphere_lab.experiments.registry import REPRODUCTIONS

__all__ = ["reproduce"]


def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help=f"One of {', '.join(REPRODUCTIONS)}.")
    ] = "",
    budget: Annotated[
        str,
        typer.Option(
            help="smoke (under a minute, with data that is built in), small (some hours on a "
            "processor), or full (all that the claim is about)."
        ),
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
    jobs: Annotated[
        int, typer.Option(help="Number of processes, each with its share of the cores.")
    ] = 1,
) -> None:
    """Run an experiment of the papers again, and show the result beside what they report."""
    if name not in REPRODUCTIONS:
        raise LabError(f"NAME must be one of {', '.join(REPRODUCTIONS)}, got {name!r}")
    if budget not in BUDGETS:
        raise LabError(f"--budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    experiment = REPRODUCTIONS[name]
    if experiment.timed and jobs > 1:
        raise LabError(f"--jobs must be 1 for {name}, whose steps are timed one by one, got {jobs}")
    at_least_one("--jobs", jobs, max(1, os.cpu_count() or 1))
    if budget == "smoke" and data_dir is not None:
        raise LabError("--data-dir has no meaning with --budget smoke, whose data is built in")
    # each process has its share of the cores, as the record will say
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    prepared = experiment.prepare(budget, usable(device), data_dir)
    ending = name if budget == "full" else f"{name}-{budget}"
    run_and_report(prepared, Place(RECORDS, "%Y-%m-%d", ending), out, resume, jobs)
