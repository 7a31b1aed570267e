"""`softsphere reproduce`: one of the experiments, at one of three budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from softsphere_lab.cli.arguments import (
    DataDir,
    Device,
    Jobs,
    Resume,
    at_least_one,
    out_option,
    share_cores,
    usable,
)
from softsphere_lab.cli.run_folders import Place, run_and_report
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.experiment import BUDGETS, Reproduction, StudyReproduction
from softsphere_lab.experiments.page import RECORDS
from softsphere_lab.experiments.registry import REPRODUCTIONS
from softsphere_lab.records.folder import Record

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
        Path | None, out_option("records/DATE-NAME-BUDGET, without -BUDGET for full")
    ] = None,
    resume: Resume = False,
    jobs: Jobs = 1,
    nproc: Annotated[
        int, typer.Option(help="Number of processes that train each run together.")
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
    if at_least_one("--nproc", nproc) > 1:
        experiment = _over_processes(experiment, nproc, jobs)
    if budget == "smoke" and data_dir is not None:
        raise LabError("--data-dir has no meaning with --budget smoke, whose data is built in")
    if resume and out is not None:
        _check_resumed(Record(out), name, budget)
    share_cores(jobs, nproc)
    prepared = experiment.prepare(budget, usable(device), data_dir)
    ending = name if budget == "full" else f"{name}-{budget}"
    run_and_report(prepared, Place(RECORDS, "%Y-%m-%d", ending), out, resume, jobs)


def _check_resumed(record: Record, name: str, budget: str) -> None:
    """Raises LabError for a record of something else, before its data is loaded."""
    old = record.config() or {}
    given = {"experiment": name, "budget": budget}
    record.check_made_with({**old, **{key: x for key, x in given.items() if key in old}})


def _over_processes(experiment: Reproduction, nproc: int, jobs: int) -> Reproduction:
    """Returns the same experiment, each of whose runs several processes train together."""
    if not isinstance(experiment, StudyReproduction) or not experiment.takes_nproc:
        able = (
            each.name
            for each in REPRODUCTIONS.values()
            if isinstance(each, StudyReproduction) and each.takes_nproc
        )
        raise LabError(
            f"--nproc must be 1 for {experiment.name}, got {nproc}; several processes train the "
            f"runs of {' and '.join(able)} alone"
        )
    if jobs > 1:
        raise LabError(
            f"--jobs must be 1 with --nproc {nproc}, whose processes train one run together, "
            f"got {jobs}"
        )
    return replace(experiment, nproc=nproc)
