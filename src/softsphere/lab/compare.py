"""Softmax and its alternatives on one data set: the same network, epochs and rates for each.

A loss with hyper-parameters of its own has these searched too, and so more trials than the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from types import NoneType
from typing import Any

from softsphere.lab.data import Images
from softsphere.lab.records import Record
from softsphere.lab.spec import LossSpec
from softsphere.lab.training import Epoch, Final, Schedule, train

__all__ = [
    "Plan",
    "Task",
    "final_runs",
    "finished",
    "remaining",
    "run",
    "total",
    "trial_runs",
]

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DEFAULT_RATE = 1e-3
# Tuning has a seed of its own, so that no final run is one that was selected.
TUNING_SEED = 1_000_003
TRIALS, RUNS = "tuning.jsonl", "metrics.jsonl"
# How the types of Epoch and Final come out of JSON.
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "float": (int, float),
    "float | None": (int, float, NoneType),
}
# What tells a run from the others.
IDENTITY = {"loss": "str", "setting": "str", "lr": "float", "seed": "int"}


@dataclass(frozen=True)
class Plan:
    """What is compared. lr None: tuned where tune is set, DEFAULT_RATE otherwise."""

    dataset: str
    losses: tuple[LossSpec, ...]
    seeds: tuple[int, ...]
    schedule: Schedule
    lr: float | None
    tune: bool

    # What may be added to when a record is gone on with.
    GROWS = ("losses", "seeds")

    def config(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "dataset": self.dataset,
            "losses": [str(spec) for spec in self.losses],
            "seeds": list(self.seeds),
            **asdict(self.schedule),
            "tune": self.tune,
            "rates": self.rates(),
        }

    def rates(self) -> list[float]:
        """The learning rates that are tried."""
        if self.lr is not None:
            return [self.lr]
        return list(RATES) if self.tune else [DEFAULT_RATE]

    def spelled_as(self, record: Record) -> Plan:
        """The same plan, the losses that a record knows under the names that they have there."""
        known = (record.config() or {}).get("losses")
        before = [LossSpec.parse(str(loss)) for loss in known] if isinstance(known, list) else []
        losses = (
            next((old for old in before if old.same(spec, self.tune)), spec) for spec in self.losses
        )
        return replace(self, losses=tuple(losses))


@dataclass(frozen=True)
class Task:
    """One training run: a trial of the search, or a final one that reads the test set."""

    loss: str
    setting: str
    lr: float
    seed: int
    trial: bool

    def line(self) -> dict[str, Any]:
        """What tells this run from the others."""
        return {
            "loss": self.loss,
            "setting": self.setting,
            "lr": self.lr,
            "seed": self.seed,
        }


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


def flaw(line: dict[str, Any]) -> str | None:
    """What a line of TRIALS or RUNS lacks: it is an epoch of a run, or its end."""
    wrong = misfit(line, IDENTITY)
    if wrong is not None:
        return wrong
    part, kind = (line["final"], Final) if "final" in line else (line, Epoch)
    return misfit(part, {field.name: str(field.type) for field in fields(kind)})


def trial_runs(record: Record) -> list[dict[str, Any]]:
    """The ends of the trials that a record has."""
    return [line for line in record.lines(TRIALS, flaw) if "final" in line]


def final_runs(record: Record) -> list[dict[str, Any]]:
    """The epochs and ends of the final runs that a record has."""

    def tested(line: dict[str, Any]) -> str | None:
        wrong = flaw(line)
        if wrong is None and "final" in line and line["final"]["test_error"] is None:
            return "has no test_error"
        return wrong

    return record.lines(RUNS, tested)


def trials(plan: Plan, spec: LossSpec) -> list[Task]:
    """The search for one loss; none where there is nothing to choose from."""
    tasks = [
        Task(str(spec), str(setting), lr, TUNING_SEED, trial=True)
        for setting in spec.candidates(plan.tune)
        for lr in plan.rates()
    ]
    return tasks if len(tasks) > 1 else []


def chosen(plan: Plan, spec: LossSpec, record: Record) -> tuple[str, float]:
    """The setting and rate with the lowest validation error, of equals the lowest on average."""
    tasks = trials(plan, spec)
    if not tasks:
        return str(spec), plan.rates()[0]
    tried = {(line["setting"], line["lr"]): line["final"] for line in trial_runs(record)}

    def errors(task: Task) -> tuple[bool, float, float]:
        final = tried[task.setting, task.lr]
        return final["diverged"], final["valid_error"], final["mean_valid_error"]

    best = min(tasks, key=errors)
    return best.setting, best.lr


def finished(plan: Plan, record: Record) -> set[Task]:
    """The tasks of the plan that the record has."""
    names = {str(spec) for spec in plan.losses}
    return {
        Task(line["loss"], line["setting"], line["lr"], line["seed"], trial)
        for lines, trial in ((trial_runs(record), True), (final_runs(record), False))
        for line in lines
        if "final" in line and line["loss"] in names and (trial or line["seed"] in plan.seeds)
    }


def remaining(plan: Plan, record: Record) -> Iterator[Task]:
    """What is not finished: trials first, then seed by seed, so that pairs are complete early.

    To be read while the tasks are done: the trials decide what the final runs are.
    """
    ready = finished(plan, record)
    for spec in plan.losses:
        yield from (task for task in trials(plan, spec) if task not in ready)
    best = {spec: chosen(plan, spec, record) for spec in plan.losses}
    for seed in plan.seeds:
        for spec, (setting, lr) in best.items():
            task = Task(str(spec), setting, lr, seed, trial=False)
            if task not in ready:
                yield task


def total(plan: Plan) -> int:
    """How many runs the whole plan has."""
    searched = sum(len(trials(plan, spec)) for spec in plan.losses)
    return searched + len(plan.seeds) * len(plan.losses)


def run(
    task: Task, data: Images, plan: Plan, record: Record, on_epoch: Callable[[Epoch], None]
) -> Final:
    """Does a task and adds it to the record: all of its lines at once, when it is finished."""
    history, final = train(
        data,
        LossSpec.parse(task.setting).loss(),
        task.lr,
        task.seed,
        plan.schedule,
        read_test=not task.trial,
        on_epoch=on_epoch,
    )
    end = {**task.line(), "final": asdict(final)}
    if task.trial:
        record.add(TRIALS, [end])
    else:
        record.add(RUNS, [*({**task.line(), **asdict(epoch)} for epoch in history), end])
    return final
