"""docs/results.md, tables and pictures, from the records alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from softsphere_lab.errors import LabError
from softsphere_lab.experiments.experiment import BUDGETS, Experiment, Section
from softsphere_lab.experiments.paper import SOURCE
from softsphere_lab.experiments.registry import EXPERIMENTS
from softsphere_lab.records.folder import Record, write

__all__ = ["PICTURES", "RECORDS", "markdown", "put", "rebuild", "sections"]

RECORDS = Path("records")
# Beside the page.
PICTURES = "results"
HEAD = f"""\
# Results

The experiments of {SOURCE}, run again with this library, and the
questions that it leaves open. Every table and picture is made by `softsphere report` from the run
folders in `records/`, which hold every epoch of every final run, the search, the command and the
environment.

Each loss has the same network, data order and budget, and a learning rate (and ε, a, b, margin or
layer's rate) that the same search chose on validation data with a seed of its own: from the same
point it goes to the best neighbour along any axis until there is no better one, so that a loss with
more numbers of its own has more trials. The test set is read once per final run. Numbers are means
over the seeds ± half of a 95 % interval (Student's t); p is that of a paired test against softmax,
corrected after Holm for all losses of a column. Images are tuned for error, text for likelihood,
and for the mean reciprocal rank (MRR) where a loss has no likelihood; trials are all runs of a
record's searches, also of one that went another way before. Where those of a search are shorter
than a final run, the rate that is best in them need not be best in a final run, unless the section
says that the rates about it were then tried in runs as long. Runs that diverged are counted, and
are in no mean and no test. Time until a perplexity that a layer comes to in its first epoch is told
as at most (≤) that epoch's. The paper's numbers are as summaries of it give them; it reports no
spread. Seconds are of training alone, on a machine that did other work besides: to be compared
roughly, within a table.
"""


def told(records: Path) -> Iterator[tuple[Experiment, Record, Section]]:
    """Each record that has a final run, in order of name."""
    for folder in sorted(records.glob("*/")):
        record = Record(folder)
        experiment = EXPERIMENTS.get((record.config() or {}).get("experiment", ""))
        section = experiment and experiment.section(record)
        if experiment and section:
            yield experiment, record, section


def sections(records: Path) -> list[tuple[Experiment, Record, Section]]:
    """Of each experiment the record with the largest budget, then the last by name.

    Smoke does not count.
    """
    best: dict[str, tuple[int, tuple[Experiment, Record, Section]]] = {}
    for each in told(records):
        experiment, record, _ = each
        budget = BUDGETS.index((record.config() or {}).get("budget", BUDGETS[0]))
        if budget >= max(1, best.get(experiment.name, (0,))[0]):
            best[experiment.name] = budget, each
    return [best[name][1] for name in EXPERIMENTS if name in best]


def markdown(records: Path) -> str:
    """The page."""
    parts = [HEAD]
    for experiment, record, section in sections(records):
        environment = record.lines("environment.jsonl")[0]
        unfinished = experiment.finished(record)
        pictures = "".join(
            f"\n![{experiment.title}: {name}]({PICTURES}/{experiment.name}-{name}.png)\n"
            for name in section.pictures
        )
        parts.append(
            f"\n## {experiment.title}\n\n"
            f"*Claim.* {experiment.claim}\n\n"
            f"`{environment['command']}` (torch {environment['packages']['torch']}, "
            f"{environment['cuda'] or environment['machine'] + ' CPU'}; "
            f"record `{record.folder.name}`)"
            + (f"; **{unfinished}**" if unfinished else "")
            + f"\n\n{section.text}{pictures}\n*Differences from the paper.* "
            f"{experiment.differences}\n"
        )
    return "".join(parts)


def put(record: Record, section: Section) -> list[Path]:
    """The section in the run folder: text and pictures. Returns what was written."""
    table = record.folder / "table.md"
    write(table, section.text)
    written = [table]
    for name, draw in section.pictures.items():
        written.append(record.folder / f"{name}.png")
        draw(written[-1])
    return written


def rebuild(records: Path, docs: Path) -> list[Path]:
    """Writes the page and every run folder's table, and draws all pictures.

    Returns what was written. Raises: LabError where no record has anything to tell, or docs cannot
    be written to.
    """
    found = sections(records)
    if not found:
        raise LabError(
            f"--records {records} has no run folder with a final run, so nothing was written; run "
            "`softsphere reproduce` at --budget small or full"
        )
    folder, drawn = docs / PICTURES, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--docs {docs} cannot be a folder ({error.strerror})") from error
    for experiment, _, section in found:
        for name, draw in section.pictures.items():
            drawn.append(folder / f"{experiment.name}-{name}.png")
            draw(drawn[-1])
    page = docs / "results.md"
    write(page, markdown(records))
    own = [path for _, record, section in told(records) for path in put(record, section)]
    return [page, *drawn, *own]
