"""Runs one task after the other on several processes, which train each of them together.

PyTorch starts the processes, and they are the ranks of a process group of `torch.distributed`. This
process tells them the task and writes the record; of the ranks the first one says how far they are,
and keeps the checkpoints.
"""

from __future__ import annotations

import shlex
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, spawn

from softsphere_lab.errors import LabError
from softsphere_lab.records.checkpoint import CheckpointOfRank
from softsphere_lab.records.folder import Line, Record
from softsphere_lab.study.ledger import checkpoint_of, planned
from softsphere_lab.study.process_ends import begin_process, interrupts_held_back
from softsphere_lab.study.protocol import Study, Task

__all__ = ["run_on_ranks"]

# What a rank says: the number of an epoch and of all epochs, the epochs and the end of a run, or
# why it cannot go on.
EPOCH, DONE, REFUSED = "epoch", "done", "refused"


@dataclass(frozen=True)
class _Job:
    """What the ranks work on. store: a file by which they find each other."""

    study: Study
    record: Record
    store: str
    threads: int


def run_on_ranks(
    study: Study, record: Record, show_epoch: Callable[[Task, int, int], None]
) -> Iterator[tuple[Task, list[Line], Line]]:
    """Runs the tasks that a record lacks on `study.nproc` processes.

    They end when this process does, however it ends. Raises LabError if one of them dies, or finds
    something that the user can mend.
    """
    if not planned(study, record).tasks:
        return
    pipes = [torch.multiprocessing.Pipe() for _ in range(study.nproc)]
    alive, lifeline = torch.multiprocessing.Pipe()
    ours, theirs = zip(*pipes, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(study, record, str(Path(folder) / "store"), torch.get_num_threads())
        with interrupts_held_back():
            context = spawn(_work, (job, theirs, lifeline), study.nproc, join=False)
        ranks = _Ranks(context, ours, record.folder)
        try:
            while tasks := planned(study, record).tasks:
                task = tasks[0]

                def on_epoch(epoch: int, epochs: int, task: Task = task) -> None:
                    show_epoch(task, epoch, epochs)

                yield task, *ranks.answer(task, on_epoch)
            ranks.leave()
        finally:
            ranks.end()
            for each in (*ours, *theirs, alive, lifeline):
                each.close()


class _Ranks:
    """The processes, as the one that started them sees them. folder: that of the record."""

    def __init__(
        self, context: ProcessContext, pipes: tuple[Connection, ...], folder: Path
    ) -> None:
        self.context, self.pipes, self.folder = context, pipes, folder

    def answer(self, task: Task, on_epoch: Callable[[int, int], None]) -> tuple[list[Line], Line]:
        """Returns the epochs and the end of a run on all ranks."""
        self._tell(task)
        while True:
            kind, *said = self._heard()
            if kind == REFUSED:
                raise LabError(*said)
            if kind == DONE:
                history, final = said
                return history, final
            on_epoch(*said)

    def leave(self) -> None:
        """Waits until all ranks have left the process group."""
        self._tell(None)
        while not self.context.join():
            pass

    def end(self) -> None:
        """Ends what has not ended."""
        for process in self.context.processes:
            process.kill()
        for process in self.context.processes:
            process.join()

    def _tell(self, task: Task | None) -> None:
        try:
            for pipe in self.pipes:
                pipe.send(task)
        except OSError:
            self._raise_failure()

    def _heard(self) -> Any:
        """Returns what a rank says next. Raises an error if one has ended."""
        sentinels = [process.sentinel for process in self.context.processes]
        ready = wait([*self.pipes, *sentinels])
        for pipe in self.pipes:
            if pipe in ready:
                return pipe.recv()
        self._raise_failure()

    def _raise_failure(self) -> NoReturn:
        """Raises what says best why the ranks cannot go on: others fail when one has died."""
        size = len(self.pipes)
        for rank, process in enumerate(self.context.processes):
            process.join(0.01)  # with 0 it would not wait for the exit code of one that has ended
            if (process.exitcode or 0) < 0:
                name = signal.Signals(-process.exitcode).name
                raise LabError(
                    f"process {rank} of --nproc {size} was ended by {name}, perhaps for lack of "
                    "memory, and the others were stopped; the same command with --resume --out "
                    f"{shlex.quote(str(self.folder))} does the rest"
                )
        self.context.join()
        raise RuntimeError(f"a process of --nproc {size} has ended before its time")


def _work(rank: int, job: _Job, pipes: tuple[Connection, ...], lifeline: Connection) -> None:
    """Joins the other ranks, and runs the tasks that it is told."""
    begin_process(lifeline)
    torch.set_num_threads(job.threads)
    size, on_gpu = job.study.nproc, job.study.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(job.store, size),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
    )
    pipe, record = pipes[rank], job.record

    def on_epoch(epoch: int, epochs: int) -> None:
        if rank == 0:
            pipe.send((EPOCH, epoch, epochs))

    try:
        data = job.study.furnished(job.study.load(), record.folder)
        while task := pipe.recv():
            kept = CheckpointOfRank(checkpoint_of(task, record).path, rank)
            history, final = job.study.train(task, data, kept, on_epoch)
            if rank == 0:
                pipe.send((DONE, history, final))
    except LabError as error:
        pipe.send((REFUSED, str(error)))
        pipe.recv()  # the other ranks may still wait for this one
    dist.destroy_process_group()
