"""What a record has of a study, and what is left to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any

from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Line, Record
from softsphere_lab.study.protocol import LOOKS, RUNS, TRIALS, TUNING_SEED, Study, Task
from softsphere_lab.study.search import Badness, Values, search

__all__ = [
    "UNFINISHED",
    "Plan",
    "add_finished",
    "checkpoint_of",
    "final_runs",
    "missing",
    "planned",
    "trial_runs",
]

# The axes of a second look: the best learning rate depends on how long one trains.
LEARNING_RATES = ("lr", "rate")
# The folder with the checkpoints of runs that have begun.
UNFINISHED = "unfinished"
# What the types of epochs and ends are when they are read from JSON.
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "float": (int, float),
    "float | None": (int, float, NoneType),
    "dict[str, float] | None": (dict, NoneType),
}
# The keys that distinguish a run from others.
IDENTITY = {"loss": "str", "setting": "str", "lr": "float", "seed": "int"}


@dataclass(frozen=True)
class Plan:
    """What can be done now, and how much is done.

    tasks: those that can be run now, the most urgent first. trials: how many the record has.
    searching: whether a search is not finished; how many trials it takes is known only then.
    finals, finals_in_all: how many final runs the record has, and how many the study asks for.
    """

    tasks: list[Task]
    trials: int
    searching: bool
    finals: int
    finals_in_all: int


def _type_error(value: Any, types: dict[str, str]) -> str | None:
    """Returns why a value of JSON is not an object with these keys, or None if it is one."""
    if not isinstance(value, dict):
        return f"must be an object, got {value!r}"
    for key, kind in types.items():
        if key not in value:
            return f"has no {key}"
        if type(value[key]) not in JSON_TYPES[kind]:
            return f"has {key} = {value[key]!r}, which is not {kind}"
    return None


def _line_error(study: type[Study], line: Line) -> str | None:
    """Returns why a line is neither an epoch nor the end of a run, or None if it is one."""
    wrong = _type_error(line, IDENTITY)
    if wrong is not None:
        return wrong
    part, kind = (line["final"], study.Final) if "final" in line else (line, study.Epoch)
    return _type_error(part, {field.name: str(field.type) for field in fields(kind)})


def trial_runs(study: type[Study], record: Record) -> list[Line]:
    """Returns the ends of the trials that a record has, those of a second look last."""
    return [*_ends_in(TRIALS, study, record), *_ends_in(LOOKS, study, record)]


def _ends_in(file: str, study: type[Study], record: Record) -> list[Line]:
    """Returns the ends of the trials in one of the files."""
    return [line for line in record.lines(file, lambda x: _line_error(study, x)) if "final" in line]


def final_runs(study: type[Study], record: Record) -> list[Line]:
    """Returns the epochs and ends of the final runs that a record has.

    A search that was continued along a longer axis, or had a second look, may have chosen another
    setting, and may have returned to an earlier one. Each name has only the runs of its last
    choice, and of a run that was done twice only the last counts.
    """

    def error_of(line: Line) -> str | None:
        wrong = _line_error(study, line)
        if wrong is None and "final" in line and line["final"][study.tested] is None:
            return f"has no {study.tested}"
        return wrong

    def choice(line: Line) -> tuple[Any, Any]:
        return line["setting"], line["lr"]

    def place(line: Line) -> tuple[Any, ...]:
        return *(line[key] for key in IDENTITY), line.get("epoch")

    lines = record.lines(RUNS, error_of)
    last = {line["loss"]: choice(line) for line in lines}
    once = {place(line): line for line in lines}
    return [line for line in once.values() if choice(line) == last[line["loss"]]]


def _searched(
    study: Study, name: str, tried: dict[Task, Line]
) -> tuple[list[Task], tuple[str, float] | None]:
    """Returns the trials of a name that come next, and the choice once there are none."""
    space = study.space(name)
    if space.size == 1:
        return [], study.setting(name, space.start)
    short, whole = (_badness_of_trials(study, name, tried, whole=whole) for whole in (False, True))
    points, best = search(space, short)
    waiting = [_trial(study, name, point) for point in points]
    if best is not None and study.second_look:
        points, best = search(space.about(best, LEARNING_RATES), whole, guess=short)
        waiting = [_trial(study, name, point, whole=True) for point in points]
    return waiting, None if best is None else study.setting(name, best)


def _trial(study: Study, name: str, point: Values, *, whole: bool = False) -> Task:
    """The trial at a point of the space of a name."""
    return Task(name, *study.setting(name, point), TUNING_SEED, trial=True, whole=whole)


def _badness_of_trials(
    study: Study, name: str, tried: dict[Task, Line], *, whole: bool
) -> Callable[[Values], Badness | None]:
    """What trials found at each point of the space of a name; None where there was none."""

    def badness(point: Values) -> Badness | None:
        final = tried.get(_trial(study, name, point, whole=whole))
        return None if final is None else study.badness(final)

    return badness


def _ends_by_task(study: Study, record: Record) -> tuple[dict[Task, Line], dict[Task, Line]]:
    """Returns the ends of the study's trials and of its final runs that the record has."""
    kind = type(study)

    def by_task(lines: Iterable[Line], **what: bool) -> dict[Task, Line]:
        return {
            Task(line["loss"], line["setting"], line["lr"], line["seed"], **what): line["final"]
            for line in lines
            if "final" in line
            and line["loss"] in study.names
            and (what["trial"] or line["seed"] in study.seeds_of(line["loss"]))
        }

    short = by_task(_ends_in(TRIALS, kind, record), trial=True)
    whole = by_task(_ends_in(LOOKS, kind, record), trial=True, whole=True)
    return {**short, **whole}, by_task(final_runs(kind, record), trial=False)


def planned(study: Study, record: Record) -> Plan:
    """Returns what can be done now.

    Trials come first, then the final runs seed by seed, so that pairs are complete early. The final
    runs of a name are planned once its search is finished. A final run with another choice does not
    count.
    """
    tried, run = _ends_by_task(study, record)
    found = {name: _searched(study, name, tried) for name in study.names}
    tasks = [task for waiting, _ in found.values() for task in waiting]
    finals = 0
    for seed in study.seeds:
        for name, (_, choice) in found.items():
            if choice is None or seed not in study.seeds_of(name):
                continue
            task = Task(name, *choice, seed, trial=False)
            if task in run:
                finals += 1
            else:
                tasks.append(task)
    searching = any(choice is None for _, choice in found.values())
    return Plan(tasks, len(tried), searching, finals, study.finals)


def missing(study: Study, record: Record) -> dict[str, int]:
    """Returns how many final runs the record lacks, for each name that lacks one."""
    tried, run = _ends_by_task(study, record)
    lacking: dict[str, int] = {}
    for name in study.names:
        _, choice = _searched(study, name, tried)
        for seed in study.seeds_of(name):
            if choice is None or Task(name, *choice, seed, trial=False) not in run:
                lacking[name] = lacking.get(name, 0) + 1
    return lacking


def checkpoint_of(task: Task, record: Record) -> Checkpoint:
    """Returns the checkpoint of a task that is not finished."""
    name = hashlib.sha256(repr(task).encode()).hexdigest()[:16]
    return Checkpoint(record.folder / UNFINISHED / f"{name}.pt")


def add_finished(task: Task, record: Record, history: list[Line], final: Line) -> None:
    """Adds a finished task to the record, all of its lines at once."""
    end = {**task.line(), "final": final}
    epochs = [] if task.trial else [{**task.line(), **epoch} for epoch in history]
    record.add(task.file, [*epochs, end])
    checkpoint_of(task, record).remove()
