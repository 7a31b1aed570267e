"""What an experiment is: a claim, a study for each budget, the section that a record makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rich.console import Console

from softsphere_lab.experiments.paper import label
from softsphere_lab.records.folder import Line, Record
from softsphere_lab.study.protocol import Study, final_runs, missing, trial_runs
from softsphere_lab.study.work import work

__all__ = ["BUDGETS", "Experiment", "Prepared", "Section", "StudyExperiment"]

# From under a minute, without network, to the whole of what is claimed.
BUDGETS = ("smoke", "small", "full")

Draw = Callable[[Path], None]


@dataclass(frozen=True)
class Section:
    """What is told of a record, as Markdown; pictures by name, each drawn when it is asked for.

    table: the main one, which a terminal shows too.
    """

    text: str
    table: str
    finding: str
    pictures: Mapping[str, Draw] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """An experiment whose data is there: what its record is made with, and how it is filled.

    run: does what the record lacks, in so many processes.
    """

    config: Line
    grows: tuple[str, ...]
    run: Callable[[Record, Console, int], None]


class Experiment(ABC):
    """One of the names that `softsphere reproduce` knows.

    claim: what is put to the test, and whose claim it is. differences: from the source, known
    beforehand. timed: whether it measures times, so that nothing may run beside it.
    """

    name: str
    title: str
    claim: str
    differences: str
    timed: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, budget: str, device: str, data_dir: Path | None) -> Prepared:
        """Loads the data of a budget. Raises: LabError where it cannot be had."""

    @abstractmethod
    def finished(self, record: Record) -> str:
        """How much of it is there, where that is not all; empty where it is."""

    @abstractmethod
    def section(self, record: Record) -> Section | None:
        """Tables and pictures of what the record has: a pure function of it. None of nothing."""


@dataclass(frozen=True)
class StudyExperiment(Experiment):
    """An experiment that is a study. tell: the section, of ends and epochs of final runs, trials
    and configuration."""

    name: str
    title: str
    claim: str
    differences: str
    studies: Mapping[str, Study]
    tell: Callable[[Ran], Section]

    def prepare(self, budget: str, device: str, data_dir: Path | None) -> Prepared:
        study = self.studies[budget].placed(device, data_dir)
        data = study.load()

        def run(record: Record, console: Console, jobs: int) -> None:
            work(study, data, record, console, self.name, jobs)

        config = {
            "experiment": self.name,
            "budget": budget,
            **study.config(),
            "data": study.fingerprint(data),
        }
        return Prepared(config, study.grows, run)

    def finished(self, record: Record) -> str:
        study = self.studies[(record.config() or {})["budget"]]
        lacking, runs = missing(study, record), len(study.seeds) * len(study.names)
        if not lacking:
            return ""
        of = ", ".join(f"{label(name)} ({count})" for name, count in lacking.items())
        return (
            f"{runs - sum(lacking.values())} of {runs} final runs are finished, after a search at "
            f"its end; missing: {of}"
        )

    def section(self, record: Record) -> Section | None:
        ran = Ran.of(self.studies["full"], record)
        return self.tell(ran) if ran.ends else None


@dataclass(frozen=True)
class Ran:
    """What a record has of a study. ends: of the final runs, by name and seed, names in order."""

    config: Line
    ends: dict[str, dict[int, Line]]
    epochs: list[Line]
    trials: list[Line]

    @classmethod
    def of(cls, study: Study, record: Record) -> Ran:
        """As the record has it."""
        config, lines = record.config() or {}, final_runs(type(study), record)
        ends: dict[str, dict[int, Line]] = {}
        for line in lines:
            if "final" in line:
                ends.setdefault(line["loss"], {})[line["seed"]] = line
        # in the order in which they were asked for, whatever the order in which they ended
        names = config.get("outputs") or config.get("losses") or []
        order = {name: place for place, name in enumerate(names)}
        ends = dict(sorted(ends.items(), key=lambda item: order.get(item[0], len(order))))
        epochs = [line for line in lines if "epoch" in line]
        return cls(config, ends, epochs, trial_runs(type(study), record))

    def tried(self, name: str) -> str:
        """How many runs the search for a name took."""
        return str(sum(line["loss"] == name for line in self.trials))

    @property
    def looked(self) -> str:
        """What the search did last, if it did."""
        asked = self.config.get("second_look")
        return ", then the rates about the best in runs as long as final ones" if asked else ""

    @property
    def lines(self) -> list[Line]:
        """The ends, as the record has them."""
        return [line for runs in self.ends.values() for line in runs.values()]
