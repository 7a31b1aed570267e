"""From the finished runs of a record to a table and a sentence: pure functions."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from softsphere_lab.report.grids import markdown, terminal
from softsphere_lab.report.inference import FEWEST_PAIRS, LEVEL, holm, interval, paired_p

__all__ = ["REFERENCE", "Row", "finding", "summarise", "to_csv", "to_markdown", "to_table"]

# What the others are compared with.
REFERENCE = "softmax"
# Smaller p are not written out, so that none is printed as zero.
LEAST = 0.001


@dataclass(frozen=True)
class Row:
    """One loss over its seeds; errors in per cent, nll None where the loss has no likelihood.

    trials: runs of the search before. diverged: how many runs, which are in no mean and no test;
    error is nan where all have. pairs: seeds shared with softmax, which are all that difference and
    p are of; p None where they are too few for a test.
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
    diverged: int


def summarise(lines: list[dict[str, Any]], trials: Iterable[dict[str, Any]] = ()) -> list[Row]:
    """A row a loss, in the order in which they were run; paired with softmax seed by seed.

    lines, trials: of the final runs and of the search, as the record has them.
    """
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if "final" in line:
            groups.setdefault(line["loss"], {})[line["seed"]] = line
    searched = Counter(trial["loss"] for trial in trials)
    sound = {
        name: {seed: run["final"] for seed, run in runs.items() if not run["final"]["diverged"]}
        for name, runs in groups.items()
    }
    reference = sound.get(REFERENCE, {})
    pairs = {
        name: [
            (100 * finals[seed]["test_error"], 100 * other["test_error"])
            for seed, other in sorted(reference.items())
            if seed in finals
        ]
        for name, finals in sound.items()
        if name != REFERENCE
    }
    tested = [name for name, both in pairs.items() if len(both) >= FEWEST_PAIRS]
    p_values = holm([paired_p(*zip(*pairs[name], strict=True)) for name in tested])
    p_of = dict(zip(tested, p_values, strict=True))
    rows = []
    for name, runs in groups.items():
        finals_of = list(sound[name].values())
        error, error_half = interval([100 * final["test_error"] for final in finals_of])
        nlls = [final["test_nll"] for final in finals_of if final["test_nll"] is not None]
        nll, nll_half = interval(nlls) if nlls else (None, None)
        some = next(iter(runs.values()))
        both = pairs.get(name)
        rows.append(
            Row(
                loss=name,
                setting=some["setting"],
                lr=some["lr"],
                trials=searched[name],
                seeds=len(runs),
                error=error,
                error_half=error_half,
                nll=nll,
                nll_half=nll_half,
                seconds=sum(run["final"]["seconds"] for run in runs.values()) / len(runs),
                pairs=len(set(sound[name]) & set(reference)),
                difference=sum(a - b for a, b in both) / len(both) if both else None,
                p=p_of.get(name),
                diverged=len(runs) - len(finals_of),
            )
        )
    return rows


HEADER = (
    "loss",
    "rate",
    "trials",
    "seeds",
    "test error %",
    "test NLL",
    "seconds",
    "Δ error",
    "p (Holm)",
)


def cells(row: Row, reference: Row | None) -> tuple[str, ...]:
    """A row as a person reads it; reference: softmax's."""

    def with_half(value: float, half: float | None, digits: int) -> str:
        known = half is not None and not math.isnan(half)
        return f"{value:.{digits}f}" + (f" ± {half:.{digits}f}" if known else "")

    name = row.setting + (f" ({row.diverged} diverged)" if row.diverged else "")
    return (
        name,
        f"{row.lr:g}",
        str(row.trials),
        str(row.seeds),
        "–" if math.isnan(row.error) else with_half(row.error, row.error_half, 2),
        "–" if row.nll is None else with_half(row.nll, row.nll_half, 4),
        f"{row.seconds:.1f}",
        difference(row, reference) or "–",
        "–" if row.p is None else probability(row.p),
    )


def reference_row(rows: list[Row]) -> Row | None:
    """The row that the others are compared with."""
    return next((row for row in rows if row.loss == REFERENCE), None)


def difference(row: Row, reference: Row | None) -> str:
    """The difference from softmax, with the pairs that it is of where other seeds were run too."""
    if row.difference is None or reference is None:
        return ""
    pairs = "" if row.pairs == row.seeds == reference.seeds else f" ({counted(row.pairs, 'pair')})"
    return f"{row.difference:+.2f}{pairs}"


def probability(p: float) -> str:
    return f"< {LEAST}" if p < LEAST else f"{p:.3f}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def to_markdown(rows: list[Row]) -> str:
    """The table for a README."""
    reference = reference_row(rows)
    return markdown(HEADER, [cells(row, reference) for row in rows])


def to_table(rows: list[Row], title: str) -> Table:
    """The table for a terminal."""
    reference = reference_row(rows)
    return terminal(HEADER, [cells(row, reference) for row in rows], title)


def to_csv(rows: list[Row]) -> str:
    """Every number of the table, unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return text.getvalue()


def finding(rows: list[Row]) -> str:
    """One sentence that says what was found, and no more than was."""
    reference = reference_row(rows)
    known = [row for row in rows if not math.isnan(row.error)]
    if not known or (reference and reference not in known):
        return f"All runs of {REFERENCE if known else 'every loss'} diverged: nothing was tested."
    best = min(known, key=lambda row: row.error)
    if reference is None:
        return (
            f"{best.loss} has the lowest test error, {best.error:.2f} %; softmax was not run, "
            "so nothing was tested."
        )
    if len(rows) == 1:
        return f"softmax alone was run: test error {best.error:.2f} %."
    name = f"softmax ({reference.error:.2f} %)"
    tested = [row for row in rows if row.p is not None]
    if not tested:
        return (
            f"No loss was tested against {name}: that takes at least {FEWEST_PAIRS} seeds that "
            "both were run with."
        )
    clear = [(row, row.p) for row in tested if row.p is not None and row.p < LEVEL]

    def told(word: str, sign: int) -> list[str]:
        names = ", ".join(
            f"{row.loss} ({difference(row, reference)}, p {'' if p < LEAST else '= '}"
            f"{probability(p)})"
            for row, p in clear
            if sign * (row.difference or 0) > 0
        )
        return [f"{word} than {name}: {names}"] if names else []

    parts = [
        *told("better", -1),
        *told("worse", 1),
    ]
    if not clear:
        parts.append(f"no loss was shown to differ from {name} beyond chance at 5 %")
    elif len(clear) < len(tested):
        parts.append("no other loss was shown to differ beyond chance")
    untested = [row.loss for row in rows if row.p is None and row is not reference]
    if untested:
        parts.append(f"not tested: {', '.join(untested)}")
    sentence = "; ".join(parts)
    few, many = min(row.pairs for row in tested), max(row.pairs for row in tested)
    seeds = f"{few} seeds" if few == many else f"{few} to {many} seeds"
    return (
        f"{sentence[0].upper()}{sentence[1:]} "
        f"({seeds}; chance is that of the seeds: initialisation and order)."
    )
