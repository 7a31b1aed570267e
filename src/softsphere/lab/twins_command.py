"""`softsphere twins`: is the factored layer's training that of a dense one, and how much faster?"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from softsphere import losses
from softsphere.lab import data, figures, tables, text
from softsphere.lab import twins as lab_twins
from softsphere.lab.errors import LabError
from softsphere.lab.options import at_least_one, positive, usable
from softsphere.lab.progress import bars, tell_stopped, terminal
from softsphere.lab.records import Record, write
from softsphere.losses import Spherical

__all__ = ["twins"]


def twins(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with NAME/train.parquet …; default $SOFTSPHERE_DATA."),
    ] = None,
    dataset: Annotated[str, typer.Option(help="A text in that folder, a sentence a row.")] = "ptb",
    loss: Annotated[str, typer.Option(help="A spherical loss.")] = "taylor_softmax",
    prior: Annotated[bool, typer.Option(help="Word frequencies as the base measure.")] = True,
    n: Annotated[int, typer.Option("--n", help="Words of an n-gram.")] = 5,
    embedding: Annotated[int, typer.Option(help="Width of an embedding.")] = 64,
    width: Annotated[int, typer.Option(help="Width d of what the output layer sees.")] = 128,
    batch_size: Annotated[int, typer.Option(help="N-grams in a step.")] = 256,
    epochs: Annotated[int, typer.Option(help="Passes over the text.")] = 3,
    lr: Annotated[float, typer.Option(help="Rate of the output layer, in classes D.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Momentum of the output layer.")] = 0.0,
    trunk_lr: Annotated[float, typer.Option(help="SGD's rate for the layers below.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of initial weights and order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64, for all of it.")] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/TIME-twins-DATASET.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Do what is missing in --out.")] = False,
) -> None:
    """Train one n-gram model with the factored layer and with a dense one under the same SGD."""
    for option, value in (("--n", n - 1), ("--embedding", embedding), ("--width", width)):
        at_least_one(option, value)
    plan = lab_twins.Plan(
        dataset=dataset,
        loss=spherical(loss),
        prior=prior,
        n=n,
        embedding=embedding,
        width=width,
        batch_size=at_least_one("--batch-size", batch_size),
        epochs=at_least_one("--epochs", epochs),
        lr=positive("--lr", lr) or lr,
        momentum=momentum,
        trunk_lr=positive("--trunk-lr", trunk_lr) or trunk_lr,
        seed=seed,
        device=usable(device),
        dtype=known_dtype(dtype),
    )
    default = os.environ.get(data.VARIABLE)
    folder = data_dir or (Path(default) if default else None)
    if folder is None:
        raise LabError(
            "--data-dir must name a folder with ptb/train.parquet, ptb/validation.parquet and "
            f"ptb/test.parquet (a column sentence); or set {data.VARIABLE}"
        )
    words = text.load(dataset, folder)
    if resume and out is None:
        raise LabError("--resume needs --out FOLDER")
    config: dict[str, Any] = asdict(plan)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-twins-{dataset}"
    where = out or Path("runs") / name
    record = Record.reopen(where, config, ()) if resume else Record.create(where, config)
    console = terminal()
    try:
        for engine in lab_twins.remaining(record):
            work(plan, engine, words, record, console)
    except KeyboardInterrupt:
        tell_stopped(console, record.folder)
        raise typer.Exit(130) from None
    report(plan, record, console)


def spherical(name: str) -> str:
    """A loss that the factored layer can have."""
    known = [key for key, kind in losses.REGISTRY.items() if issubclass(kind, Spherical)]
    if name not in known:
        raise LabError(f"--loss must be one of {', '.join(known)}, got {name!r}")
    return name


def known_dtype(name: str) -> str:
    """A dtype that the factored layer can have."""
    if name not in ("float32", "float64"):
        raise LabError(f"--dtype must be float32 or float64, got {name!r}")
    return name


def work(
    plan: lab_twins.Plan, engine: str, words: text.Text, record: Record, console: Console
) -> None:
    """One engine's training, with a bar on a terminal and a line an epoch elsewhere."""
    progress = bars(console)
    with progress:
        bar = progress.add_task(engine)

        def show(epoch: int, step: int, steps: int) -> None:
            progress.update(
                bar,
                description=f"{engine} epoch {epoch}",
                completed=(epoch - 1) * steps + step,
                total=plan.epochs * steps,
            )
            if step == steps and not console.is_terminal:
                print(f"{engine}: epoch {epoch} of {plan.epochs}", flush=True)

        lab_twins.run(plan, engine, words, record, show)


def report(plan: lab_twins.Plan, record: Record, console: Console) -> None:
    """Table, picture and one sentence."""
    lines = record.lines(lab_twins.RUNS)
    normalised = losses.get(plan.loss).normalised
    header, *rows = lab_twins.table(lines, normalised)
    what = "perplexity" if normalised else "loss"
    title = (
        f"{plan.dataset} {what}, {plan.loss}, n = {plan.n}, d = {plan.width}, m = {plan.batch_size}"
    )
    write(record.folder / "table.md", tables.markdown(header, rows))
    picture = record.folder / "twins.png"
    figures.twins(lines, title, picture)
    console.print(tables.terminal(header, rows, title))
    console.print(f"Picture: {picture}", markup=False, highlight=False)
    console.print(finding(lines), markup=False, highlight=False)


def finding(lines: list[dict[str, Any]]) -> str:
    """How far the two curves are apart, and how the steps compare."""
    by = {
        engine: [line for line in lines if line["engine"] == engine and "epoch" in line]
        for engine in lab_twins.ENGINES
    }
    pairs = list(zip(by["factored"], by["dense"], strict=True))
    apart = max(abs(math.expm1(a["valid_loss"] - b["valid_loss"])) for a, b in pairs)
    ratio = sum(b["step_seconds"] for _, b in pairs) / sum(a["step_seconds"] for a, _ in pairs)
    return (
        f"The two curves differ by at most {100 * apart:.2g} % of the perplexity; a whole step "
        f"with the dense layer takes {ratio:.1f} times as long."
    )
