"""From the finished runs of a record to a table and a sentence: pure functions."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from softsphere.lab.inference import holm, interval, paired_p

__all__ = ["Row", "finding", "summarise", "to_csv", "to_markdown", "to_table"]

REFERENCE = "softmax"
LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """One loss over its seeds; errors in per cent, nll None where the loss has no likelihood."""

    loss: str
    setting: str
    lr: float
    seeds: int
    error: float
    error_half: float
    nll: float | None
    nll_half: float | None
    seconds: float
    difference: float | None
    p: float | None
    diverged: int


def summarise(finals: list[dict[str, Any]]) -> list[Row]:
    """A row a loss, in the order in which they were run; paired with softmax seed by seed."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for line in finals:
        groups.setdefault(line["loss"], {})[line["seed"]] = line
    reference = groups.get(REFERENCE, {})
    pairs = {
        name: [
            (100 * runs[seed]["final"]["test_error"], 100 * other["final"]["test_error"])
            for seed, other in sorted(reference.items())
            if seed in runs
        ]
        for name, runs in groups.items()
        if name != REFERENCE and reference
    }
    tested = [name for name, both in pairs.items() if both]
    p_values = holm([paired_p(*zip(*pairs[name], strict=True)) for name in tested])
    p_of = dict(zip(tested, p_values, strict=True))
    rows = []
    for name, runs in groups.items():
        finals_of = [run["final"] for run in runs.values()]
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
                seeds=len(runs),
                error=error,
                error_half=error_half,
                nll=nll,
                nll_half=nll_half,
                seconds=sum(final["seconds"] for final in finals_of) / len(finals_of),
                difference=sum(a - b for a, b in both) / len(both) if both else None,
                p=p_of.get(name),
                diverged=sum(final["diverged"] for final in finals_of),
            )
        )
    return rows


HEADER = (
    "loss",
    "rate",
    "seeds",
    "test error %",
    "test NLL",
    "seconds",
    "Δ error",
    "p (Holm)",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row as a person reads it."""

    def with_half(value: float, half: float | None, digits: int) -> str:
        known = half is not None and not math.isnan(half)
        return f"{value:.{digits}f}" + (f" ± {half:.{digits}f}" if known else "")

    name = row.setting + (f" ({row.diverged} diverged)" if row.diverged else "")
    return (
        name,
        f"{row.lr:g}",
        str(row.seeds),
        with_half(row.error, row.error_half, 2),
        "–" if row.nll is None else with_half(row.nll, row.nll_half, 4),
        f"{row.seconds:.1f}",
        "–" if row.difference is None else f"{row.difference:+.2f}",
        "–" if row.p is None or math.isnan(row.p) else f"{row.p:.3f}",
    )


def to_markdown(rows: list[Row]) -> str:
    """The table for a README."""
    lines = [HEADER, tuple("---" for _ in HEADER), *map(cells, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def to_table(rows: list[Row], title: str) -> Table:
    """The table for a terminal."""
    table = Table(title=title, box=box.SIMPLE)
    for column, name in enumerate(HEADER):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def to_csv(rows: list[Row]) -> str:
    """Every number of the table, unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    return text.getvalue()


def finding(rows: list[Row]) -> str:
    """One sentence that says what was found, and no more than was."""
    reference = next((row for row in rows if row.loss == REFERENCE), None)
    best = min(rows, key=lambda row: row.error)
    if reference is None:
        return (
            f"{best.loss} has the lowest test error, {best.error:.2f} %; softmax was not run, "
            "so nothing was tested."
        )
    if len(rows) == 1:
        return f"softmax alone was run: test error {best.error:.2f} %."
    if reference.seeds < 2:
        return "One seed tells nothing of chance: run at least two for a test against softmax."
    clear = [row for row in rows if row.p is not None and row.p < LEVEL]
    if not clear:
        return (
            f"No loss differs from softmax ({reference.error:.2f} %) beyond chance at 5 % "
            f"over {reference.seeds} seeds."
        )

    def told(word: str, chosen: list[Row]) -> str:
        names = ", ".join(f"{row.loss} ({row.difference:+.2f}, p = {row.p:.3f})" for row in chosen)
        return f"{word} than softmax ({reference.error:.2f} %): {names}" if chosen else ""

    parts = (
        told("better", [row for row in clear if (row.difference or 0) < 0]),
        told("worse", [row for row in clear if (row.difference or 0) > 0]),
    )
    sentence = "; ".join(part for part in parts if part)
    rest = "; no other loss differs beyond chance" if len(clear) < len(rows) - 1 else ""
    return f"{sentence[0].upper()}{sentence[1:]}{rest} ({reference.seeds} seeds)."
