"""What a record has of a study: the one form in which tables and pictures read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from softsphere_lab.records.folder import Line, Record
from softsphere_lab.study.ledger import final_runs, trial_runs
from softsphere_lab.study.protocol import Study

__all__ = ["Draw", "Results", "Section"]

# Draws a picture to a file.
Draw = Callable[[Path], None]


@dataclass(frozen=True)
class Section:
    """The section of a record, in Markdown.

    text: all of it, the table and the finding included. table: the main table, which a terminal
    shows too. finding: what was found, in a sentence or two. note: explains the table's signs.
    pictures: by name, each drawn when it is called. csv: all numbers, where it is worth having.
    """

    text: str
    table: str
    finding: str
    note: str = ""
    pictures: Mapping[str, Draw] = field(default_factory=dict)
    csv: str = ""


@dataclass(frozen=True)
class Results:
    """The finished runs of a study.

    ends: the ends of the final runs, by name and then by seed, with the names in the order in which
    they were asked for. epochs: a line for each epoch of a final run. trials: the ends of the runs
    of the search.
    """

    config: Line
    ends: dict[str, dict[int, Line]]
    epochs: list[Line]
    trials: list[Line]

    @classmethod
    def of_record(cls, study: type[Study], record: Record) -> Results:
        """Reads a record. Raises LabError if one of its lines is spoiled."""
        config = record.config() or {}
        return cls.of_lines(config, final_runs(study, record), trial_runs(study, record))

    @classmethod
    def of_lines(cls, config: Line, lines: Iterable[Line], trials: Iterable[Line] = ()) -> Results:
        """Sorts the lines of final runs into epochs and ends."""
        ends: dict[str, dict[int, Line]] = {}
        epochs = []
        for line in lines:
            if "final" in line:
                ends.setdefault(line["loss"], {})[line["seed"]] = line
            else:
                epochs.append(line)
        # runs end in another order than the one in which they were asked for
        names = config.get("outputs") or config.get("losses") or []
        order = {name: place for place, name in enumerate(names)}
        ends = dict(sorted(ends.items(), key=lambda item: order.get(item[0], len(order))))
        return cls(config, ends, epochs, list(trials))

    def trials_of(self, name: str) -> int:
        """Returns how many runs the search for a name took."""
        return sum(line["loss"] == name for line in self.trials)

    @property
    def second_look(self) -> str:
        """What a sentence about the search says of a second look; empty if there was none."""
        asked = self.config.get("second_look")
        return ", then the rates about the best in runs as long as final ones" if asked else ""

    @property
    def lines(self) -> list[Line]:
        """The ends of the final runs, as the record has them."""
        return [line for runs in self.ends.values() for line in runs.values()]
