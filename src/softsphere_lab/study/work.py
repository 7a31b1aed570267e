"""Does what a record lacks of a study, in this process or in several."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from softsphere_lab.errors import LabError
from softsphere_lab.progress import Phases
from softsphere_lab.records.folder import Line, Record
from softsphere_lab.study.ledger import UNFINISHED, Plan, add_finished, checkpoint_of, planned
from softsphere_lab.study.on_ranks import run_on_ranks
from softsphere_lab.study.process_ends import begin_process, interrupts_held_back
from softsphere_lab.study.protocol import Study, Task

__all__ = ["work"]

# A task with its epochs and its end.
Done = tuple[Task, list[Line], Line]
# Called with a task, the number of an epoch and the number of epochs.
OnTaskEpoch = Callable[[Task, int, int], None]


def work(study: Study, data: Any, record: Record, console: Console, jobs: int = 1) -> None:
    """Does everything that the record lacks, and shows how far it is.

    data: what `study.load` returns. With several jobs, and for a study that trains each run on
    several processes, each process loads the data for itself.
    """
    data = study.furnished(data, record.folder)
    searches = any(study.space(name).size > 1 for name in study.names)
    with Phases(console, searches) as phases:

        def show_epoch(task: Task, epoch: int, epochs: int) -> None:
            phases.describe(task.trial, f"{_task_label(task)}  epoch {epoch} of {epochs}")

        def show_plan(plan: Plan) -> None:
            phases.show_search(plan.trials, plan.searching)
            phases.show_finals(plan.finals, plan.finals_in_all)

        show_plan(planned(study, record))
        each: Iterator[Done]
        if study.nproc > 1:
            each = run_on_ranks(study, record, show_epoch)
        elif jobs > 1:
            each = _run_in_processes(study, record, jobs)
        else:
            each = _run_here(study, data, record, show_epoch)
        for task, history, final in each:
            add_finished(task, record, history, final)
            plan = planned(study, record)
            show_plan(plan)
            phases.describe(task.trial, _task_label(task))
            if not console.is_terminal:
                what = f"{_task_label(task)}  {study.outcome(final)}"
                print(f"[{_place_of(task, plan)}] {what}", flush=True)
    # no run is unfinished any more
    shutil.rmtree(record.folder / UNFINISHED, ignore_errors=True)


def _place_of(task: Task, plan: Plan) -> str:
    """Returns the number of a finished task; how many trials there will be is not known.

    >>> _place_of(Task("z_loss", "z_loss", 0.1, 0, trial=True), Plan([], 4, True, 0, 10))
    'trial 4'
    >>> _place_of(Task("z_loss", "z_loss", 0.1, 0, trial=False), Plan([], 4, False, 3, 10))
    'run 3 of 10'
    """
    return f"trial {plan.trials}" if task.trial else f"run {plan.finals} of {plan.finals_in_all}"


def _task_label(task: Task) -> str:
    """Returns a task in a few words."""
    what = "whole trial" if task.whole else "trial" if task.trial else f"seed {task.seed}"
    return f"{task.setting} lr {task.lr:g} {what}"


def _run_here(study: Study, data: Any, record: Record, show_epoch: OnTaskEpoch) -> Iterator[Done]:
    """Runs one task after the other in this process."""
    while tasks := planned(study, record).tasks:
        task = tasks[0]

        def on_epoch(epoch: int, epochs: int, task: Task = task) -> None:
            show_epoch(task, epoch, epochs)

        yield task, *study.train(task, data, checkpoint_of(task, record), on_epoch)


def _run_in_processes(study: Study, record: Record, jobs: int) -> Iterator[Done]:
    """Runs a task for each job at a time, each in a process with as many threads as this one.

    The processes end when this one does, however it ends: each holds one end of a pipe whose other
    end only this process holds.
    """
    ours, theirs = get_context("spawn").Pipe()
    pool = ProcessPoolExecutor(
        jobs,
        get_context("spawn"),
        initializer=_begin_process,
        initargs=(study, record.folder, theirs, torch.get_num_threads()),
    )
    running: dict[Future[tuple[list[Line], Line]], Task] = {}
    try:
        while True:
            waiting = [t for t in planned(study, record).tasks if t not in running.values()]
            for task in waiting[: jobs - len(running)]:
                with interrupts_held_back():
                    running[pool.submit(_run_task, task, record)] = task
            if not running:
                # the processes leave by themselves, and clean up
                pool.shutdown()
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                yield task, *future.result()
    except BrokenProcessPool as error:
        raise LabError(
            "a process of --jobs died, perhaps of too little memory; take fewer jobs, and --resume"
        ) from error
    finally:
        ours.close()
        theirs.close()
        pool.shutdown(wait=True, cancel_futures=True)


# What a process of `_run_in_processes` works on.
process_state: dict[str, Any] = {}


def _begin_process(study: Study, folder: Path, lifeline: Connection, threads: int) -> None:
    """Is called once in each process."""
    begin_process(lifeline)
    torch.set_num_threads(threads)
    try:
        process_state.update(study=study, data=study.furnished(study.load(), folder))
    except Exception as error:
        # The first task raises it: a pool says of a process that fails here only that it is broken.
        process_state["failure"] = error


def _run_task(task: Task, record: Record) -> tuple[list[Line], Line]:
    """Runs a task in a process that has begun."""
    if "failure" in process_state:
        raise process_state["failure"]
    study: Study = process_state["study"]
    return study.train(task, process_state["data"], checkpoint_of(task, record), lambda *_: None)
