"""Does what a record lacks of a study, in this process or in several."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from os import _exit
from typing import Any

import torch
from rich.console import Console

from softsphere_lab.errors import LabError
from softsphere_lab.progress import bars
from softsphere_lab.records.folder import Line, Record
from softsphere_lab.study.protocol import (
    UNFINISHED,
    Study,
    Task,
    checkpoint,
    keep,
    missing,
    planned,
)

__all__ = ["work"]

Done = tuple[Task, list[Line], Line]


def work(
    study: Study,
    data: Any,
    record: Record,
    console: Console,
    title: str,
    jobs: int = 1,
) -> None:
    """Everything that the record lacks, with a bar on a terminal and a line a run elsewhere.

    data: what `study.load` gives; with several jobs each process loads it for itself.
    """
    progress = bars(console)
    with progress:
        bar = progress.add_task(title)

        def show(task: Task, epoch: int, epochs: int) -> None:
            progress.update(bar, description=f"{named(task)}  epoch {epoch} of {epochs}")

        each = alone(study, data, record, show) if jobs == 1 else together(study, record, jobs)
        for task, history, final in each:
            keep(task, record, history, final)
            # how many trials a search takes is known when it is at its end
            _, done = planned(study, record)
            runs = done + sum(missing(study, record).values())
            progress.update(bar, completed=done, total=runs)
            if jobs > 1:
                progress.update(bar, description=named(task))
            if not console.is_terminal:
                print(f"[{done}/{runs}] {named(task)}  {study.told(final)}", flush=True)
    # nothing is under way
    shutil.rmtree(record.folder / UNFINISHED, ignore_errors=True)


def named(task: Task) -> str:
    """A task in a few words."""
    what = "whole trial" if task.whole else "trial" if task.trial else f"seed {task.seed}"
    return f"{task.setting} lr {task.lr:g} {what}"


def alone(
    study: Study, data: Any, record: Record, show: Callable[[Task, int, int], None]
) -> Iterator[Done]:
    """One task after the other, in this process."""
    while tasks := planned(study, record)[0]:
        task = tasks[0]

        def on_epoch(epoch: int, epochs: int, task: Task = task) -> None:
            show(task, epoch, epochs)

        yield task, *study.train(task, data, checkpoint(task, record), on_epoch)


def together(study: Study, record: Record, jobs: int) -> Iterator[Done]:
    """As many tasks at a time as there are jobs, each in a process with as many threads as this.

    The processes end when this one does, however it ends: each holds an end of a pipe whose other
    end is here alone.
    """
    ours, theirs = get_context("spawn").Pipe()
    pool = ProcessPoolExecutor(
        jobs,
        get_context("spawn"),
        initializer=begin,
        initargs=(study, theirs, torch.get_num_threads()),
    )
    running: dict[Future[tuple[list[Line], Line]], Task] = {}
    try:
        while True:
            waiting = [t for t in planned(study, record)[0] if t not in running.values()]
            for task in waiting[: jobs - len(running)]:
                with interrupts_held_back():
                    running[pool.submit(perform, task, record)] = task
            if not running:
                # they leave by themselves, and clean up
                pool.shutdown()
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                yield task, *future.result()
    except BrokenProcessPool as error:
        raise LabError(
            "a process of --jobs died, of too little memory perhaps; take fewer, and --resume"
        ) from error
    finally:
        ours.close()
        theirs.close()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """A process that is started meanwhile never sees Ctrl-C, and this one only afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What a process of `together` works on.
state: dict[str, Any] = {}


def begin(study: Study, lifeline: Connection, threads: int) -> None:
    """Once in each process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        state.update(study=study, data=study.load())
    except Exception as error:
        # told by the first task: of a process that fails here a pool says only that it is broken
        state["failure"] = error


def end_with(lifeline: Connection) -> None:
    """Waits until nobody holds the other end, and leaves at once."""
    try:
        lifeline.recv()
    except EOFError:
        _exit(1)


def perform(task: Task, record: Record) -> tuple[list[Line], Line]:
    """A task, in a process that has begun."""
    if "failure" in state:
        raise state["failure"]
    study: Study = state["study"]
    return study.train(task, state["data"], checkpoint(task, record), lambda *_: None)
