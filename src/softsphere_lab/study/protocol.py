"""What a comparison trains: a search for each name, then its final runs, seed by seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from softsphere_lab.errors import LabError
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Line
from softsphere_lab.study.search import Space

__all__ = ["LOOKS", "RUNS", "TRIALS", "TUNING_SEED", "OnEpoch", "Study", "Task"]

# The search has a seed of its own, so that no final run is one that was selected.
TUNING_SEED = 1_000_003
TRIALS, LOOKS, RUNS = "tuning.jsonl", "looks.jsonl", "metrics.jsonl"

# Called after each epoch with its number and the number of epochs.
OnEpoch = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """One training run: a trial of the search, or a final run, which reads the test set.

    loss: the name of what is compared. setting: the same with the numbers that are searched for.
    whole: whether a trial is as long as a final run.
    """

    loss: str
    setting: str
    lr: float
    seed: int
    trial: bool
    whole: bool = False

    @property
    def file(self) -> str:
        """The file of a record that the run is written to."""
        return (LOOKS if self.whole else TRIALS) if self.trial else RUNS

    def line(self) -> Line:
        """Returns what distinguishes the lines of this run from those of others."""
        return {"loss": self.loss, "setting": self.setting, "lr": self.lr, "seed": self.seed}


class Study(ABC):
    """What is compared and how it is trained. It is small, so that it can be sent to a process."""

    # The fields of a record's lines: one line for each epoch and one for the end of a run.
    # `tested` is a key of the end; it is None in the end of a trial.
    Epoch: ClassVar[type]
    Final: ClassVar[type]
    tested: ClassVar[str]
    # The lists of `config` that may get longer when a record is resumed.
    grows: ClassVar[tuple[str, ...]]

    seeds: tuple[int, ...]
    # Whether the search, once it is finished, continues along the learning rates in trials that are
    # as long as final runs.
    second_look: bool
    # How many processes train each run together, and where: cpu, cuda, …
    nproc: int = 1
    device: str = "cpu"

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of what is compared."""

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """Returns the seeds that a name is run with: all of them, or the first ones."""
        return self.seeds

    @property
    def finals(self) -> int:
        """How many final runs the study asks for."""
        return sum(len(self.seeds_of(name)) for name in self.names)

    @abstractmethod
    def space(self, name: str) -> Space:
        """Returns what the search for a name may try."""

    @abstractmethod
    def setting(self, name: str, values: dict[str, float]) -> tuple[str, float]:
        """Returns the setting and the learning rate at a point of the space."""

    @abstractmethod
    def badness(self, final: Line) -> tuple[float, ...]:
        """Returns what the search minimises, given the end of a trial."""

    @abstractmethod
    def outcome(self, final: Line) -> str:
        """Returns the end of a run in a few words."""

    @abstractmethod
    def placed(self, device: str, data_dir: Path | None) -> Study:
        """Returns the same study on a device, with data from a folder."""

    def over_processes(self, nproc: int) -> Study:
        """Returns the same study, each of whose runs several processes train together.

        Raises LabError if they cannot.
        """
        raise LabError(f"--nproc must be 1, got {nproc}: one process trains each run of this study")

    @abstractmethod
    def config(self) -> Line:
        """Returns all that is asked for, as JSON. The fingerprint says which data it is."""

    @abstractmethod
    def fingerprint(self, data: Any) -> Line:
        """Returns what distinguishes this data from other data of the same name, as JSON."""

    @abstractmethod
    def load(self) -> Any:
        """Loads the data. Each process does so for itself."""

    def furnished(self, data: Any, folder: Path) -> Any:
        """Returns the data with what is made from it once, and kept in the folder of a record."""
        return data

    @abstractmethod
    def train(
        self, task: Task, data: Any, kept: Checkpoint, on_epoch: OnEpoch
    ) -> tuple[list[Line], Line]:
        """Returns the epochs and the end of a run, which continues from its checkpoint."""

    def spelled_as(self, config: Line) -> Study:
        """Returns the same study, with the names that a record's configuration has for them."""
        return self
