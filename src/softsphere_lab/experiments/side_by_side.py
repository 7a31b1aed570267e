"""One training by several engines: what is missing in a record, and how they compare."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from softsphere import losses
from softsphere_lab.errors import LabError
from softsphere_lab.progress import bars, tell_stopped, terminal
from softsphere_lab.records.folder import Record, write
from softsphere_lab.report import figures
from softsphere_lab.report import grids as tables
from softsphere_lab.training.language import OnStep

__all__ = ["RUNS", "perform"]

RUNS = "metrics.jsonl"
Lines = list[dict[str, Any]]


def perform(
    name: str,
    config: dict[str, Any],
    engines: Sequence[str],
    train: Callable[[str, OnStep], Lines],
    *,
    title: str,
    out: Path | None,
    resume: bool,
) -> None:
    """Trains with every engine that a run folder lacks, and reports; Ctrl-C keeps what is done."""
    if resume and out is None:
        raise LabError("--resume needs --out FOLDER")
    where = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{config['dataset']}"
    record = Record.reopen(where, config, ()) if resume else Record.create(where, config)
    console = terminal()
    try:
        with record.alone():
            for engine in remaining(record, engines):
                work(engine, config["epochs"], train, record, console)
    except KeyboardInterrupt:
        tell_stopped(console, record.folder)
        raise typer.Exit(130) from None
    report(record, engines, title, losses.get(config["loss"]).normalised, console)


def remaining(record: Record, engines: Sequence[str]) -> list[str]:
    """The engines that are not finished."""
    done = {line["engine"] for line in record.lines(RUNS) if "final" in line}
    return [engine for engine in engines if engine not in done]


def work(
    engine: str,
    epochs: int,
    train: Callable[[str, OnStep], Lines],
    record: Record,
    console: Console,
) -> None:
    """One engine's training, with a bar on a terminal and a line an epoch elsewhere.

    It is added to the record whole.
    """
    progress = bars(console)
    with progress:
        bar = progress.add_task(engine)

        def show(epoch: int, step: int, steps: int) -> None:
            progress.update(
                bar,
                description=f"{engine} epoch {epoch}",
                completed=(epoch - 1) * steps + step,
                total=epochs * steps,
            )
            if step == steps and not console.is_terminal:
                print(f"{engine}: epoch {epoch} of {epochs}", flush=True)

        lines = train(engine, show)
    if not all(math.isfinite(line["valid_loss"]) for line in lines if "epoch" in line):
        raise LabError(f"{engine} has diverged; lower --lr")
    record.add(RUNS, [{"engine": engine, **line} for line in lines])


def table(lines: Lines, engines: Sequence[str], normalised: bool) -> list[tuple[str, ...]]:
    """Header and a row an engine: validation loss or perplexity by epoch, test, step time."""

    def shown(loss: float) -> str:
        return f"{math.exp(loss):.3f}" if normalised else f"{loss:.6f}"

    epochs = sorted({line["epoch"] for line in lines if "epoch" in line})
    header = ("engine", *(f"epoch {e}" for e in epochs), "test", "ms a step")
    rows = [header]
    for engine in engines:
        own = curve(lines, engine)
        final = [line for line in lines if line["engine"] == engine and "final" in line]
        if not final:
            continue
        milliseconds = 1000 * sum(line["step_seconds"] for line in own) / len(epochs)
        rows.append(
            (
                engine,
                *(shown(line["valid_loss"]) for line in own),
                shown(final[0]["final"]["test_loss"]),
                f"{milliseconds:.2f}",
            )
        )
    return rows


def curve(lines: Lines, engine: str) -> Lines:
    """The epochs of an engine, in order."""
    own = [line for line in lines if line["engine"] == engine and "epoch" in line]
    return sorted(own, key=lambda line: line["epoch"])


def report(
    record: Record, engines: Sequence[str], title: str, normalised: bool, console: Console
) -> None:
    """Table, picture and a sentence for each engine but the last, which they are compared with."""
    lines = record.lines(RUNS)
    header, *rows = table(lines, engines, normalised)
    write(record.folder / "table.md", tables.markdown(header, rows))
    picture = record.folder / "curves.png"
    figures.side_by_side(lines, title, picture)
    console.print(tables.terminal(header, rows, title))
    console.print(f"Picture: {picture}", markup=False, highlight=False)
    for engine in engines[:-1]:
        console.print(finding(lines, engine, engines[-1]), markup=False, highlight=False)


def finding(lines: Lines, engine: str, reference: str) -> str:
    """How far two curves are apart, and how the steps compare."""
    pairs = list(zip(curve(lines, engine), curve(lines, reference), strict=True))
    apart = max(abs(a["valid_loss"] - b["valid_loss"]) / abs(b["valid_loss"]) for a, b in pairs)
    ratio = sum(b["step_seconds"] for _, b in pairs) / sum(a["step_seconds"] for a, _ in pairs)
    return (
        f"The curves of {engine} and {reference} differ by at most {apart:.1e} of the loss; a "
        f"whole step by {reference} takes {ratio:.1f} times as long."
    )
