"""Runs one task after the other on several processes, which train each of them together.

PyTorch starts the processes, and they are the ranks of a process group of `torch.distributed`. The
process that starts them tells them each task and writes the record. The first rank alone reports
epochs and results, and writes the checkpoints.
"""

from __future__ import annotations

import shlex
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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

# The first word of a message from a rank. The rest is the number of the epoch and the number of
# epochs, the history and the end of a run, or the text of a LabError.
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
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        job = _Job(study, record, str(Path(folder) / "store"), torch.get_num_threads())
        with interrupts_held_back():
            ranks = _Ranks(job)
            stack.callback(ranks.end)
        while tasks := planned(study, record).tasks:
            task = tasks[0]

            def on_epoch(epoch: int, epochs: int, task: Task = task) -> None:
                show_epoch(task, epoch, epochs)

            yield task, *ranks.answer(task, on_epoch)
        ranks.leave()


class _Ranks:
    """The processes, as the one that starts them sees them."""

    def __init__(self, job: _Job) -> None:
        self.folder, size = job.record.folder, job.study.nproc
        self.alive, lifeline = torch.multiprocessing.Pipe()
        pairs = [torch.multiprocessing.Pipe() for _ in range(size)]
        self.pipes, theirs = zip(*pairs, strict=True)
        self.context: ProcessContext = spawn(_work, (job, theirs, lifeline), size, join=False)
        for each in (*theirs, lifeline):
            each.close()

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
        """Ends the processes that have not ended."""
        for process in self.context.processes:
            process.kill()
        for process in self.context.processes:
            process.join()
        for each in (*self.pipes, self.alive):
            each.close()

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
        try:
            for pipe in self.pipes:
                if pipe in ready:
                    return pipe.recv()
        except (EOFError, OSError):  # it ended while it wrote
            pass
        self._raise_failure()

    def _raise_failure(self) -> NoReturn:
        """Raises an error that names a rank that was killed, or else one with the first traceback.

        When a rank is killed, the others fail as well.
        """
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
        device_id=torch.device("cuda", rank) if on_gpu else None,
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
