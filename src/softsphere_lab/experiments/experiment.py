"""What an experiment is: it fills a record, and makes a section of what the record has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from softsphere_lab.records.folder import Line, Record
from softsphere_lab.report.paper import label
from softsphere_lab.report.results import Results, Section
from softsphere_lab.study.ledger import missing
from softsphere_lab.study.protocol import Study
from softsphere_lab.study.work import work

__all__ = [
    "BUDGETS",
    "Experiment",
    "Prepared",
    "Reproduction",
    "StudyReproduction",
    "prepare_study",
]

# From under a minute and without network to all that the claim is about.
BUDGETS = ("smoke", "small", "full")


@dataclass(frozen=True)
class Prepared:
    """An experiment whose data is loaded.

    config: what its record is made with. grows: the lists in it that may get longer when a record
    is resumed. run: does what the record lacks, in a number of processes. spelled_as: returns the
    same with the names that a record's configuration has for what is compared. nproc: how many
    processes train each run together. device: where they compute.
    """

    config: Line
    grows: tuple[str, ...]
    run: Callable[[Record, Console, int], None]
    spelled_as: Callable[[Line], Prepared] | None = None
    nproc: int = 1
    device: str = "cpu"


def prepare_study(study: Study, data: Any, **what: str) -> Prepared:
    """Returns a study as what fills a record. what: the first keys of its configuration."""

    def run(record: Record, console: Console, jobs: int) -> None:
        work(study, data, record, console, jobs)

    def spelled_as(config: Line) -> Prepared:
        return prepare_study(study.spelled_as(config), data, **what)

    config = {**what, **study.config(), "data": study.fingerprint(data)}
    return Prepared(config, study.grows, run, spelled_as, study.nproc, study.device)


class Experiment(ABC):
    """What is run, resumed, recorded and reported in one way. name: as the records have it."""

    name: str
    title: str

    @abstractmethod
    def unfinished(self, record: Record) -> str:
        """Returns what a record lacks, in words; an empty string if it lacks nothing."""

    @abstractmethod
    def section(self, record: Record) -> Section | None:
        """Returns tables and pictures as a pure function of a record, or None of an empty one."""


class Reproduction(Experiment):
    """An experiment with a claim and three budgets, which `softsphere reproduce` runs by its name.

    claim: what is put to the test, and whose claim it is. differences: from the source, as far as
    they are known beforehand. timed: whether it measures times, so that nothing may run beside it.
    """

    claim: str
    differences: str
    timed: bool = False

    @abstractmethod
    def prepare(self, budget: str, device: str, data_dir: Path | None) -> Prepared:
        """Loads the data of a budget. Raises LabError if it cannot be had."""


@dataclass(frozen=True)
class StudyReproduction(Reproduction):
    """A reproduction that is a study for each budget, with a function that makes its section.

    takes_nproc: whether several processes can train each of its runs together. nproc: how many of
    them do.
    """

    name: str
    title: str
    claim: str
    differences: str
    studies: Mapping[str, Study]
    section_of: Callable[[Results], Section]
    timed: bool = False
    takes_nproc: bool = False
    nproc: int = 1
    device: str = "cpu"

    def prepare(self, budget: str, device: str, data_dir: Path | None) -> Prepared:
        study = self.studies[budget].placed(device, data_dir)
        if self.nproc > 1:
            study = study.over_processes(self.nproc)
        return prepare_study(study, study.load(), experiment=self.name, budget=budget)

    def unfinished(self, record: Record) -> str:
        study = self.studies[(record.config() or {})["budget"]]
        lacking, runs = missing(study, record), study.finals
        if not lacking:
            return ""
        counted = ", ".join(f"{label(name)} ({count})" for name, count in lacking.items())
        return (
            f"{runs - sum(lacking.values())} of {runs} final runs are finished, after a finished "
            f"search; missing: {counted}"
        )

    def section(self, record: Record) -> Section | None:
        results = Results.of_record(type(self.studies["full"]), record)
        return self.section_of(results) if results.ends else None
