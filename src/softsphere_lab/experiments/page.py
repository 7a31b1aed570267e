"""The pages that a record makes: its own README.md, and docs/results.md of the best records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from softsphere_lab.errors import LabError
from softsphere_lab.experiments.earlier import EarlierRecord, record_at
from softsphere_lab.experiments.experiment import BUDGETS, Experiment, Reproduction
from softsphere_lab.experiments.registry import REPRODUCTIONS, experiment_of
from softsphere_lab.records.files import write
from softsphere_lab.records.folder import ENVIRONMENT, Record
from softsphere_lab.report.paper import SOURCE
from softsphere_lab.report.results import Section

__all__ = [
    "PAGE",
    "README",
    "RECORDS",
    "SMOKE",
    "Report",
    "best_records",
    "rebuild",
    "report_of",
    "results_page",
]

RECORDS = Path("records")
README, PAGE = "README.md", "results.md"
# What is said of a record with the budget smoke.
SMOKE = (
    "A test of the program on small data that come with it. The numbers say nothing about the "
    "claim of the experiment, nor about its data set."
)
HEAD = f"""\
# Results

The experiments of {SOURCE}, run again with this library, and
the questions that it leaves open. `softsphere report` makes this page, its tables and its pictures
from the run folders in `records/`, which hold every epoch of every final run, the search, the
command and the environment.

Each loss has the same network, data order and budget. The same search chose its learning rate (and
its ε, a, b, margin or layer's rate) on validation data, with a seed of its own: from the same point
it goes to the best neighbour along any axis until no neighbour is better, so that a loss with more
numbers of its own has more trials. The test set is read once in each final run. Numbers are means
over the seeds ± half of a 95 % interval (Student's t); p is that of a paired test against softmax,
after Holm's correction for all losses of a column. Images are tuned for error, text for likelihood,
and for the mean reciprocal rank (MRR) where a loss has no likelihood. Trials are all runs of a
record's searches, those of an earlier search that chose another rate included. Where trials are
shorter than a final run, the rate that is best in them need not be best in a final run, unless the
section says that the rates about it were then tried in runs as long. Runs that diverged are
counted, and are in no mean and no test. A validation perplexity that a layer reaches in its first
epoch is said to take at most (≤) the time of that epoch. The paper's numbers are as summaries of it
give them; it reports no spread. Seconds are of training alone, on a machine that did other work
too: compare them roughly, and within a table.
"""


@dataclass(frozen=True)
class Report:
    """A record with its experiment and the section that it makes."""

    experiment: Experiment
    record: Record
    section: Section

    def markdown(self, heading: str, folder: Path) -> str:
        """Returns the section with what it is about. folder: that of the page, for its links."""
        claim = differences = ""
        title = self.experiment.title
        if self.is_smoke:
            title += ", smoke test"
            claim = f"*{SMOKE}*\n\n"
        elif isinstance(self.experiment, Reproduction):
            claim = f"*Claim.* {self.experiment.claim}\n\n"
            differences = f"\n*Differences from the paper.* {self.experiment.differences}\n"
        unfinished = self.experiment.unfinished(self.record)
        pictures = "".join(
            f"\n![{title}: {name}]({_link(path, folder)})\n" for name, path in self.pictures.items()
        )
        return (
            f"{heading} {title}\n\n{claim}"
            f"{_environment_sentence(self.record)}{f'; **{unfinished}**' if unfinished else ''}"
            f"\n\n{self.section.text}{pictures}{differences}"
        )

    @property
    def is_smoke(self) -> bool:
        """Whether it is of a reproduction that only shows that the program works."""
        reproduced = isinstance(self.experiment, Reproduction)
        return reproduced and _place_of_budget(self.record) == 0

    @property
    def pictures(self) -> dict[str, Path]:
        """Where each picture of the section is."""
        return {name: self.record.folder / f"{name}.png" for name in self.section.pictures}

    def put(self) -> list[Path]:
        """Writes the README, the pictures and the CSV. Returns what was written."""
        folder = self.record.folder
        written = [folder / README]
        write(written[0], self.markdown("#", folder))
        if self.section.csv:
            written.append(folder / "table.csv")
            write(written[-1], self.section.csv)
        for name, path in self.pictures.items():
            self.section.pictures[name](path)
            written.append(path)
        return written


def report_of(record: Record) -> Report | None:
    """Returns the report of a record, or None if it is of no experiment or has no final run."""
    experiment = experiment_of(record)
    section = experiment and experiment.section(record)
    return Report(experiment, record, section) if experiment and section else None


def _link(path: Path, folder: Path) -> str:
    """Returns the address of a file as a page in that folder has it.

    >>> _link(Path("records/a/b.png"), Path("docs"))
    '../records/a/b.png'
    """
    return Path(os.path.relpath(path, folder)).as_posix()


def _environment_sentence(record: Record) -> str:
    """Returns the command that made a record, and where it ran."""
    first = record.environments()[0]
    device = first["cuda"] or f"{first['machine']} CPU"
    again = ""
    if isinstance(record, EarlierRecord):
        again = f"; today `softsphere reproduce {record.experiment.name} --budget full`"
    return (
        f"`{first['command']}` (torch {first['packages']['torch']}, {device}; "
        f"record `{record.folder.name}`{again})"
    )


def _all_reports(records: Path) -> Iterator[Report]:
    """Returns the report of each record that has a final run, in order of name."""
    for folder in sorted(records.glob("*/")):
        if (folder / ENVIRONMENT).exists() and not (folder / "config.json").exists():
            raise LabError(
                f"{folder} has no config.json, so that its runs cannot be told; restore the file, "
                "or remove the folder"
            )
        found = report_of(record_at(folder))
        if found:
            yield found


def best_records(records: Path) -> list[Report]:
    """Returns, of each reproduction, the record with the largest budget; of equal ones the last.

    Records of the smoke budget do not count.
    """
    best: dict[str, tuple[int, Report]] = {}
    for each in _all_reports(records):
        budget = _place_of_budget(each.record)
        if budget >= max(1, best.get(each.experiment.name, (0,))[0]):
            best[each.experiment.name] = budget, each
    return [best[name][1] for name in REPRODUCTIONS if name in best]


def _place_of_budget(record: Record) -> int:
    """Returns the place of a record's budget among the budgets, which grow; 0 without one."""
    budget = (record.config() or {}).get("budget", BUDGETS[0])
    if budget not in BUDGETS:
        raise LabError(
            f"{record.folder / 'config.json'}: budget must be one of {', '.join(BUDGETS)}, got "
            f"{budget!r}; restore the file, or remove the folder"
        )
    return BUDGETS.index(budget)


def results_page(found: list[Report], docs: Path) -> str:
    """Returns docs/results.md."""
    return "\n".join([HEAD, *(each.markdown("##", docs) for each in found)])


def rebuild(records: Path, docs: Path) -> list[Path]:
    """Writes the page, and the README and the pictures of every run folder.

    Returns what was written. Raises LabError if no record is fit for the page, or docs cannot be
    written to.
    """
    best = best_records(records)
    if not best:
        raise LabError(
            f"--records {records} has no final run of `softsphere reproduce` at --budget small or "
            "full, so nothing was written; run one"
        )
    try:
        docs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--docs {docs} cannot be a folder ({error.strerror})") from error
    page = docs / PAGE
    write(page, results_page(best, docs))
    return [page, *(path for each in _all_reports(records) for path in each.put())]
