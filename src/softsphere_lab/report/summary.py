"""Losses compared on images: a row for each loss, a table, and what was found in sentences."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from softsphere_lab.report.grids import markdown
from softsphere_lab.report.inference import FEWEST_PAIRS, LEVEL
from softsphere_lab.report.measures import (
    REFERENCE,
    Metric,
    difference,
    estimate,
    mean,
    number_cell,
    p_cell,
    p_equation,
    p_values,
    pairs,
)
from softsphere_lab.report.results import Results

__all__ = [
    "ERROR",
    "NLL",
    "SECONDS",
    "Column",
    "Row",
    "columns_with_differences",
    "csv_text",
    "finding",
    "markdown_table",
    "summarise",
]

ERROR = Metric("test_error", "test error %", 2, lambda share: 100 * share)
NLL = Metric("test_nll", "test NLL", 4)
SECONDS = Metric("seconds", "seconds", 0)


@dataclass(frozen=True)
class Row:
    """One loss over its seeds. Errors are in per cent.

    trials: how many runs its search took. seeds: how many final runs there are; diverged: how many
    of them diverged, which are in no mean and no test, so that means are NaN if all have. `nll` is
    None for a loss without likelihoods. pairs: the seeds that softmax was run with too; difference
    (to softmax), p and nll_p are of these pairs, and None without them or with too few for a test.
    """

    loss: str
    setting: str
    lr: float
    trials: int
    seeds: int
    error: float
    error_half: float
    nll: float | None
    nll_half: float | None
    seconds: float
    pairs: int
    difference: float | None
    p: float | None
    nll_p: float | None
    diverged: int


# The title of a column, and its cell in a row.
Column = tuple[str, Callable[[Row], str]]


def summarise(results: Results) -> list[Row]:
    """Returns a row for each loss, in the order in which they were asked for."""
    ends = results.ends
    reference = dict.fromkeys(ends, REFERENCE)
    errors_p, nlls_p = (p_values(ends, metric, reference) for metric in (ERROR, NLL))
    rows = []
    for name, runs in ends.items():
        error, error_half = estimate(runs, ERROR)
        has_nll = mean(runs, NLL) is not None
        nll, nll_half = estimate(runs, NLL) if has_nll else (None, None)
        some = next(iter(runs.values()))
        rows.append(
            Row(
                loss=name,
                setting=some["setting"],
                lr=some["lr"],
                trials=results.trials_of(name),
                seeds=len(runs),
                error=error,
                error_half=error_half,
                nll=nll,
                nll_half=nll_half,
                seconds=estimate(runs, SECONDS)[0],
                pairs=len(pairs(ends, name, REFERENCE, ERROR.key)),
                difference=None if name == REFERENCE else difference(ends, name, REFERENCE, ERROR),
                p=errors_p.get(name),
                nll_p=nlls_p.get(name),
                diverged=sum(line["final"]["diverged"] for line in runs.values()),
            )
        )
    return rows


def _reference_row(rows: Sequence[Row]) -> Row | None:
    """Returns the row that the others are compared with."""
    return next((row for row in rows if row.loss == REFERENCE), None)


def columns_with_differences(rows: Sequence[Row]) -> list[Column]:
    """Returns the columns of a comparison, with the difference of each error from softmax's."""
    reference = _reference_row(rows)

    def change(row: Row) -> str:
        if row.difference is None or reference is None:
            return "–"
        counted = f" ({row.pairs} pair{'' if row.pairs == 1 else 's'})"
        all_paired = row.pairs == row.seeds == reference.seeds
        return f"{row.difference:+.2f}{'' if all_paired else counted}"

    def named(row: Row) -> str:
        return row.setting + (f" ({row.diverged} diverged)" if row.diverged else "")

    return [
        ("loss", named),
        ("rate", lambda row: f"{row.lr:g}"),
        ("trials", lambda row: str(row.trials)),
        ("seeds", lambda row: str(row.seeds)),
        (ERROR.title, error_cell),
        (NLL.title, nll_cell),
        (SECONDS.title, lambda row: seconds_cell(row, 1)),
        ("Δ error", change),
        ("p", lambda row: p_cell(row.p)),
    ]


def error_cell(row: Row) -> str:
    """Returns the error and half of its interval."""
    return number_cell(row.error, row.error_half, ERROR.digits)


def nll_cell(row: Row) -> str:
    """Returns the likelihood and half of its interval, or a dash for a loss without one."""
    if row.nll is None or row.nll_half is None:
        return "–"
    return number_cell(row.nll, row.nll_half, NLL.digits)


def seconds_cell(row: Row, digits: int = SECONDS.digits) -> str:
    """Returns the mean seconds of training."""
    return number_cell(row.seconds, math.nan, digits)


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Returns the table in Markdown."""
    return markdown(
        [title for title, _ in columns], [[cell(row) for _, cell in columns] for row in rows]
    )


def csv_text(rows: Sequence[Row]) -> str:
    """Returns every number of the rows, unrounded, as comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return text.getvalue()


# What the tests leave out.
_CHANCE = (
    "The tests cover chance from the seeds, which set initialisation and order, and not from the "
    "choice of test images."
)


def finding(rows: Sequence[Row], named: Callable[[str], str] = str) -> str:
    """Returns sentences that say what was found, and no more than was.

    named: what a loss is called.
    """
    reference = _reference_row(rows)
    known = [row for row in rows if not math.isnan(row.error)]
    if not known or (reference is not None and reference not in known):
        whose = named(REFERENCE) if known else "every loss"
        return f"All runs of {whose} diverged, so nothing was tested."
    if reference is None:
        best = min(known, key=lambda row: row.error)
        return (
            f"{named(best.loss)} has the lowest test error, {best.error:.2f} %; softmax was not "
            "run, so nothing was tested."
        )
    if len(rows) == 1:
        return f"softmax alone was run: test error {reference.error:.2f} %."
    if all(row.p is None for row in rows):
        return (
            f"No loss was tested against softmax ({reference.error:.2f} %): a test takes at least "
            f"{FEWEST_PAIRS} seeds that both were run with."
        )
    return " ".join(_test_sentences(rows, reference, named))


def _test_sentences(rows: Sequence[Row], reference: Row, named: Callable[[str], str]) -> list[str]:
    """Returns a sentence for each outcome of the tests that some loss had."""
    softmax = f"softmax ({reference.error:.2f} %)"
    groups: dict[str, list[str]] = {
        f"Better in test error than {softmax}": [],
        f"Worse in test error than {softmax}": [],
        f"Not shown to differ in test error from {softmax}": [],
        "Not tested, with too few common seeds": [],
    }
    better, worse, alike, untested = groups.values()
    for row in rows:
        if row is reference:
            continue
        if row.p is None or row.difference is None:
            untested.append(named(row.loss))
        elif row.p >= LEVEL:
            alike.append(named(row.loss))
        else:
            name = f"{named(row.loss)} ({row.error:.2f} %, {p_equation(row.p)})"
            (better if row.difference < 0 else worse).append(name)
    sentences = [f"{words}: {', '.join(names)}." for words, names in groups.items() if names]
    tested = [row.pairs for row in rows if row.p is not None]
    if min(tested) < max(tested):
        sentences.append(f"The tests are of {min(tested)} to {max(tested)} common seeds.")
    if not any(row.trials for row in rows):
        sentences.append(
            f"All losses had the same learning rate, {reference.lr:g}. It was not searched for, "
            "and a search for each loss, by --tune, may change the order."
        )
    return [*sentences, _CHANCE]
