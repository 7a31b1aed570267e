"""What is trained for a comparison: a search for each loss, then its final runs, seed by seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Line, Record
from softsphere_lab.study.search import Space, search

__all__ = [
    "LOOKS",
    "RUNS",
    "TRIALS",
    "TUNING_SEED",
    "UNFINISHED",
    "OnEpoch",
    "Study",
    "Task",
    "checkpoint",
    "final_runs",
    "keep",
    "missing",
    "planned",
    "trial_runs",
]

# Tuning has a seed of its own, so that no final run is one that was selected.
TUNING_SEED = 1_000_003
TRIALS, LOOKS, RUNS = "tuning.jsonl", "looks.jsonl", "metrics.jsonl"
# The axes that a second look goes along: the best learning rate depends on how long one trains.
LEARNING_RATES = ("lr", "rate")
# The folder of the states of runs under way.
UNFINISHED = "unfinished"
# How the types of epochs and finals come out of JSON.
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "float": (int, float),
    "float | None": (int, float, NoneType),
}
# What tells a run from the others.
IDENTITY = {"loss": "str", "setting": "str", "lr": "float", "seed": "int"}

# Told after each epoch: its number and how many there are.
OnEpoch = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """One training run: a trial of the search, or a final one that reads the test set.

    loss: what is compared, as the study calls it; setting: the same with the numbers searched for.
    whole: of a trial, whether it is as long as a final run.
    """

    loss: str
    setting: str
    lr: float
    seed: int
    trial: bool
    whole: bool = False

    @property
    def file(self) -> str:
        """Where a record has it."""
        return (LOOKS if self.whole else TRIALS) if self.trial else RUNS

    def line(self) -> Line:
        """What tells this run from the others."""
        return {"loss": self.loss, "setting": self.setting, "lr": self.lr, "seed": self.seed}


class Study(ABC):
    """What is compared and how it is trained: small enough to be sent to another process."""

    # Of the lines of a record: one an epoch, one at the end. `tested` is None in a trial's end.
    Epoch: ClassVar[type]
    Final: ClassVar[type]
    tested: ClassVar[str]
    # The lists of `config` that may be added to when a record is gone on with.
    grows: ClassVar[tuple[str, ...]]

    seeds: tuple[int, ...]
    # Whether the search, once it is at its end, goes on from there along the learning rates in
    # trials as long as final runs.
    second_look: bool

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of what is compared."""

    @abstractmethod
    def space(self, name: str) -> Space:
        """What the search may try."""

    @abstractmethod
    def setting(self, name: str, values: dict[str, float]) -> tuple[str, float]:
        """The setting and the learning rate at a point of the space."""

    @abstractmethod
    def badness(self, final: Line) -> tuple[float, ...]:
        """What the search makes as small as it can, of a trial's end."""

    @abstractmethod
    def told(self, final: Line) -> str:
        """The end of a run in a few words."""

    @abstractmethod
    def placed(self, device: str, data_dir: Path | None) -> Study:
        """The same study on that device, with data from that folder."""

    @abstractmethod
    def config(self) -> Line:
        """All that is asked, as JSON; where the data came from is told by its fingerprint."""

    @abstractmethod
    def fingerprint(self, data: Any) -> Line:
        """What tells this data from other data of the same name, as JSON."""

    @abstractmethod
    def load(self) -> Any:
        """The data, which each process loads for itself."""

    @abstractmethod
    def train(
        self, task: Task, data: Any, kept: Checkpoint, on_epoch: OnEpoch
    ) -> tuple[list[Line], Line]:
        """The epochs and the end of a run, which goes on from what is kept of it."""


def misfit(value: Any, kinds: dict[str, str]) -> str | None:
    """What keeps a value of JSON from being an object with these keys, None if nothing does."""
    if not isinstance(value, dict):
        return f"must be an object, got {value!r}"
    for key, kind in kinds.items():
        if key not in value:
            return f"has no {key}"
        if type(value[key]) not in KINDS[kind]:
            return f"has {key} = {value[key]!r}, which is not {kind}"
    return None


def flaw(study: type[Study], line: Line) -> str | None:
    """What a line of one of the files lacks: it is an epoch of a run, or its end."""
    wrong = misfit(line, IDENTITY)
    if wrong is not None:
        return wrong
    part, kind = (line["final"], study.Final) if "final" in line else (line, study.Epoch)
    return misfit(part, {field.name: str(field.type) for field in fields(kind)})


def trial_runs(study: type[Study], record: Record) -> list[Line]:
    """The ends of the trials that a record has, those of a second look last."""
    return [*tried_in(TRIALS, study, record), *tried_in(LOOKS, study, record)]


def tried_in(file: str, study: type[Study], record: Record) -> list[Line]:
    """The ends of the trials in one of the files."""
    return [line for line in record.lines(file, lambda x: flaw(study, x)) if "final" in line]


def final_runs(study: type[Study], record: Record) -> list[Line]:
    """The epochs and ends of the final runs that a record has, each loss's with its last choice.

    A search that went on along a longer axis, or had a second look, may have chosen anew, and may
    have come back: of a run that was done twice the last counts.
    """

    def tested(line: Line) -> str | None:
        wrong = flaw(study, line)
        if wrong is None and "final" in line and line["final"][study.tested] is None:
            return f"has no {study.tested}"
        return wrong

    def choice(line: Line) -> tuple[Any, Any]:
        return line["setting"], line["lr"]

    def place(line: Line) -> tuple[Any, ...]:
        return *(line[key] for key in IDENTITY), line.get("epoch")

    lines = record.lines(RUNS, tested)
    last = {line["loss"]: choice(line) for line in lines}
    once = {place(line): line for line in lines}
    return [line for line in once.values() if choice(line) == last[line["loss"]]]


def searched(
    study: Study, name: str, tried: dict[Task, Line]
) -> tuple[list[Task], tuple[str, float] | None]:
    """The trials of a loss that have to be done next; and, after the last, what was chosen."""
    space = study.space(name)
    if space.size == 1:
        return [], study.setting(name, space.start)
    waiting, best = trials(study, name, space, tried, whole=False)
    if best is None or not study.second_look:
        return waiting, None if best is None else study.setting(name, best)
    waiting, best = trials(study, name, space.about(best, LEARNING_RATES), tried, whole=True)
    return waiting, None if best is None else study.setting(name, best)


def trials(
    study: Study, name: str, space: Space, tried: dict[Task, Line], *, whole: bool
) -> tuple[list[Task], dict[str, float] | None]:
    """The trials that a search waits for, and where it ends."""

    def trial(values: dict[str, float]) -> Task:
        return Task(name, *study.setting(name, values), TUNING_SEED, trial=True, whole=whole)

    def badness(values: dict[str, float]) -> tuple[float, ...] | None:
        final = tried.get(trial(values))
        return None if final is None else study.badness(final)

    waiting, best = search(space, badness)
    return [trial(values) for values in waiting], best


def ends(study: Study, record: Record) -> tuple[dict[Task, Line], dict[Task, Line]]:
    """The ends of the study's trials and of its final runs that the record has."""
    kind = type(study)

    def of(lines: Iterable[Line], **what: bool) -> dict[Task, Line]:
        return {
            Task(line["loss"], line["setting"], line["lr"], line["seed"], **what): line["final"]
            for line in lines
            if "final" in line
            and line["loss"] in study.names
            and (what["trial"] or line["seed"] in study.seeds)
        }

    short = of(tried_in(TRIALS, kind, record), trial=True)
    whole = of(tried_in(LOOKS, kind, record), trial=True, whole=True)
    return {**short, **whole}, of(final_runs(kind, record), trial=False)


def planned(study: Study, record: Record) -> tuple[list[Task], int]:
    """What can be done now, and how many runs of the study the record has.

    Trials come first, then the final runs seed by seed, so that pairs are complete early; those of
    a loss are there once its search is at its end. A final run with another choice does not count.
    """
    tried, run = ends(study, record)
    found = {name: searched(study, name, tried) for name in study.names}
    tasks = [task for waiting, _ in found.values() for task in waiting]
    done = len(tried)
    for seed in study.seeds:
        for name, (_, choice) in found.items():
            if choice is None:
                continue
            task = Task(name, *choice, seed, trial=False)
            if task in run:
                done += 1
            else:
                tasks.append(task)
    return tasks, done


def missing(study: Study, record: Record) -> dict[str, int]:
    """How many final runs the record lacks, of each name of which it lacks one."""
    tried, run = ends(study, record)
    lacking: dict[str, int] = {}
    for name in study.names:
        _, choice = searched(study, name, tried)
        for seed in study.seeds:
            if choice is None or Task(name, *choice, seed, trial=False) not in run:
                lacking[name] = lacking.get(name, 0) + 1
    return lacking


def checkpoint(task: Task, record: Record) -> Checkpoint:
    """Where the state of a task is while it is not finished."""
    name = hashlib.sha256(repr(task).encode()).hexdigest()[:16]
    return Checkpoint(record.folder / UNFINISHED / f"{name}.pt")


def keep(task: Task, record: Record, history: list[Line], final: Line) -> None:
    """Adds a finished task to the record: all of its lines at once."""
    end = {**task.line(), "final": final}
    epochs = [] if task.trial else [{**task.line(), **epoch} for epoch in history]
    record.add(task.file, [*epochs, end])
    checkpoint(task, record).remove()
