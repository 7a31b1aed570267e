"""`softsphere compare`: options in, a run folder, a table and a picture out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softsphere.lab import data, figures, models, summary
from softsphere.lab.compare import (
    Plan,
    Task,
    final_runs,
    finished,
    remaining,
    run,
    total,
    trial_runs,
)
from softsphere.lab.errors import LabError
from softsphere.lab.options import at_least_one, folder, positive, usable
from softsphere.lab.progress import bars, tell_stopped, terminal
from softsphere.lab.records import Record, write
from softsphere.lab.spec import LossSpec, distinct
from softsphere.lab.training import Epoch, Final, Schedule

__all__ = ["compare"]

DEFAULT_LOSSES = "softmax,taylor_softmax,spherical_softmax,z_loss,squared_error"
RUNS_FOLDER = Path("runs")

# Far more than anybody runs.
MOST_SEEDS, MOST_EPOCHS = 10_000, 100_000


def compare(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(data.DATASETS)}.")] = "digits",
    losses: Annotated[
        str, typer.Option(help="Names, with hyper-parameters as in z_loss:a=1:b=4.")
    ] = DEFAULT_LOSSES,
    seeds: Annotated[int, typer.Option(help="How many: 0, 1, …")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 20,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(models.MODELS)}.")] = "mlp",
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 128,
    lr: Annotated[
        float | None, typer.Option(help="Adam's rate; 0.001, or what --tune finds.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Choose the rate on validation data, and, in more trials, a loss's own numbers.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            parser=folder,
            metavar="FOLDER",
            help="Folder with NAME/train.parquet; default $SOFTSPHERE_DATA, or the hub.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=folder, metavar="FOLDER", help="Run folder; default runs/TIME-compare-DATASET."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Do only what is missing in --out, or the last run.")
    ] = False,
) -> None:
    """Train one network with each loss and each seed, and say which is better."""
    plan = Plan(
        dataset=dataset,
        losses=specs(losses, tune),
        seeds=tuple(range(at_least_one("--seeds", seeds, MOST_SEEDS))),
        schedule=Schedule(
            model=models.known(model),
            epochs=at_least_one("--epochs", epochs, MOST_EPOCHS),
            batch_size=at_least_one("--batch-size", batch_size),
            device=usable(device),
        ),
        lr=positive("--lr", lr),
        tune=tune,
    )
    images = data.load(dataset, data_dir).to(device)
    models.suited(model, images.shape, images.num_classes)
    plan, record = opened(plan, images, out, resume)
    console = terminal()
    try:
        work(plan, images, record, console)
    except KeyboardInterrupt:
        report(record, console)
        tell_stopped(console, record.folder)
        raise typer.Exit(130) from None
    report(record, console)


def specs(text: str, tune: bool) -> tuple[LossSpec, ...]:
    """The losses of a comma-separated list, each once."""
    return distinct(map(LossSpec.parse, text.split(",")), tune)


def opened(plan: Plan, images: data.Images, out: Path | None, resume: bool) -> tuple[Plan, Record]:
    """A new run folder, or the one that is gone on with, and the plan in its words."""
    fingerprint = {"data": images.fingerprint()}
    config = plan.config() | fingerprint
    if not resume:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-compare-{plan.dataset}"
        return plan, Record.create(out or RUNS_FOLDER / name, config)
    if out is None:
        folders = sorted(RUNS_FOLDER.glob(f"*-compare-{plan.dataset}"), reverse=True)
        out = next((f for f in folders if Record(f).matches(config, Plan.GROWS)), None)
        if out is None:
            raise LabError(
                f"--resume: no folder {RUNS_FOLDER}/*-compare-{plan.dataset} was made with these "
                "options; leave --resume out to begin one, or name it with --out"
            )
    plan = plan.spelled_as(Record(out))
    return plan, Record.reopen(out, plan.config() | fingerprint, Plan.GROWS)


def work(plan: Plan, images: data.Images, record: Record, console: Console) -> None:
    """Everything that the record lacks, with a bar on a terminal and a line a run elsewhere."""
    done, runs = len(finished(plan, record)), total(plan)
    progress = bars(console)
    with progress:
        bar = progress.add_task(plan.dataset, total=runs, completed=done)
        for number, task in enumerate(remaining(plan, record), done + 1):

            def show(epoch: Epoch, task: Task = task) -> None:
                progress.update(bar, description=f"{named(task)}  epoch {epoch.epoch}")

            final = run(task, images, plan, record, show)
            progress.advance(bar)
            if not console.is_terminal:
                print(f"[{number}/{runs}] {named(task)}  {told(final)}", flush=True)


def named(task: Task) -> str:
    """A task in a few words."""
    return f"{task.setting} lr {task.lr:g} {'trial' if task.trial else f'seed {task.seed}'}"


def told(final: Final) -> str:
    """What a run ended with."""
    test = "" if final.test_error is None else f", test {100 * final.test_error:.2f} %"
    return f"valid {100 * final.valid_error:.2f} %{test}" + (
        " (diverged)" if final.diverged else ""
    )


def report(record: Record, console: Console) -> None:
    """Table, picture and one sentence, of what is finished."""
    lines = final_runs(record)
    rows = summary.summarise(lines, trial_runs(record))
    if not rows:
        console.print("No run is finished yet.")
        return
    config = record.config() or {}
    write(record.folder / "table.md", summary.to_markdown(rows))
    write(record.folder / "table.csv", summary.to_csv(rows))
    title = f"{config['dataset']}, {config['model']}, {config['epochs']} epochs"
    picture = record.folder / "comparison.png"
    figures.comparison(lines, rows, title, picture)
    console.print(summary.to_table(rows, title))
    console.print(f"Picture: {picture}", markup=False, highlight=False, soft_wrap=True)
    console.print(summary.finding(rows), markup=False, highlight=False, soft_wrap=True)
