"""Records that commands of earlier versions made, read as records of today."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_engines import engines, twins
from softsphere_lab.records.folder import Line, Record

__all__ = ["EarlierRecord", "record_at"]


def record_at(folder: Path) -> Record:
    """Returns the record in a folder, also if the command that made it is no more."""
    record = Record(folder)
    experiment = _made_for(record.config() or {})
    return record if experiment is None else EarlierRecord(folder, experiment)


def _made_for(config: Line) -> StudyReproduction | None:
    """Returns the experiment that took the place of the command that made a record.

    The commands `softsphere twins` and `softsphere engines` wrote no name of an experiment.
    """
    if "experiment" in config:
        return None
    if "trunk_lr" in config:
        return twins.FLOAT64 if config["dtype"] == "float64" else twins.FLOAT32
    return engines.EXPERIMENT if {"loss", "length", "width"} <= config.keys() else None


class EarlierRecord(Record):
    """A record of `softsphere twins` or `softsphere engines`, whose lines name an engine."""

    def __init__(self, folder: Path, experiment: StudyReproduction) -> None:
        super().__init__(folder)
        self.experiment = experiment

    def config(self) -> Line | None:
        config = super().config()
        if config is None:
            return None
        study = self.experiment.studies["full"].placed(config["device"], None)
        return {
            "experiment": self.experiment.name,
            "budget": "full",
            **config,
            "engines": list(study.names),
        }

    def lines(
        self, name: str, flaw: Callable[[Line], str | None] = lambda line: None
    ) -> list[Line]:
        config = super().config() or {}

        def translated(line: Line) -> Line:
            if "engine" not in line:
                return line
            rest = {key: value for key, value in line.items() if key not in ("engine", "health")}
            who = {"loss": line["engine"], "setting": line["engine"]}
            new = {**who, "lr": config["lr"], "seed": config["seed"], **rest}
            if "final" in line:
                end = {"health": line.get("health"), "diverged": False}
                new["final"] = {**line["final"], **end}
            return new

        return [translated(line) for line in super().lines(name, lambda x: flaw(translated(x)))]
