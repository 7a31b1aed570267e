"""`softsphere reproduce`: one of the experiments, at one of three budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softsphere_lab.cli.arguments import (
    DataDir,
    Device,
    Jobs,
    Resume,
    out_option,
    share_cores,
    usable,
)
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
    out: Annotated[Path | None, out_option("records/DATE-NAME-BUDGET")] = None,
    resume: Resume = False,
    jobs: Jobs = 1,
) -> None:
    """Run an experiment of the papers again, and show the result beside what they report."""
    if name not in REPRODUCTIONS:
        raise LabError(f"NAME must be one of {', '.join(REPRODUCTIONS)}, got {name!r}")
    if budget not in BUDGETS:
        raise LabError(f"--budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    experiment = REPRODUCTIONS[name]
    if experiment.timed and jobs > 1:
        raise LabError(f"--jobs must be 1 for {name}, whose steps are timed one by one, got {jobs}")
    if budget == "smoke" and data_dir is not None:
        raise LabError("--data-dir has no meaning with --budget smoke, whose data is built in")
    share_cores(jobs)
    prepared = experiment.prepare(budget, usable(device), data_dir)
    ending = name if budget == "full" else f"{name}-{budget}"
    run_and_report(prepared, Place(RECORDS, "%Y-%m-%d", ending), out, resume, jobs)
