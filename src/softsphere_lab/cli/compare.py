"""`softsphere compare`: options in, a run folder, a table and a picture out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softsphere_lab.cli.arguments import (
    DataDir,
    Device,
    Epochs,
    Resume,
    at_least_one,
    folder,
    positive,
    usable,
)
from softsphere_lab.data import images as data
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.classification import RATES, Classification
from softsphere_lab.models import networks as models
from softsphere_lab.progress import tell_stopped, terminal
from softsphere_lab.records.folder import Record, write
from softsphere_lab.report import figures, summary
from softsphere_lab.study.protocol import final_runs, trial_runs
from softsphere_lab.study.search import Axis
from softsphere_lab.study.spec import LossSpec, distinct
from softsphere_lab.study.work import work
from softsphere_lab.training.image_run import Schedule

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
    epochs: Epochs = 20,
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
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=folder, metavar="FOLDER", help="Run folder; default runs/TIME-compare-DATASET."
        ),
    ] = None,
    resume: Resume = False,
) -> None:
    """Train one network with each loss and each seed, and say which is better."""
    given = positive("--lr", lr)
    study = Classification(
        dataset=dataset,
        losses=specs(losses, tune),
        seeds=tuple(range(at_least_one("--seeds", seeds, MOST_SEEDS))),
        schedule=Schedule(
            model=models.known(model),
            epochs=at_least_one("--epochs", epochs, MOST_EPOCHS),
            batch_size=at_least_one("--batch-size", batch_size),
            device=usable(device),
        ),
        rates=RATES if tune and given is None else Axis.fixed(given or RATES.start),
        tune=tune,
        data_dir=data_dir,
    )
    images = study.load()
    models.suited(model, images.shape, images.num_classes)
    study, record = opened(study, images, out, resume)
    console = terminal()
    try:
        with record.alone():
            work(study, images, record, console, dataset)
    except KeyboardInterrupt:
        report(record, console)
        tell_stopped(console, record.folder)
        raise typer.Exit(130) from None
    report(record, console)


def specs(text: str, tune: bool) -> tuple[LossSpec, ...]:
    """The losses of a comma-separated list, each once."""
    return distinct(map(LossSpec.parse, text.split(",")), tune)


def opened(
    study: Classification, images: data.Images, out: Path | None, resume: bool
) -> tuple[Classification, Record]:
    """A new run folder, or the one that is gone on with, and the study in its words."""
    fingerprint = {"data": study.fingerprint(images)}
    config = study.config() | fingerprint
    if not resume:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-compare-{study.dataset}"
        return study, Record.create(out or RUNS_FOLDER / name, config)
    if out is None:
        folders = sorted(RUNS_FOLDER.glob(f"*-compare-{study.dataset}"), reverse=True)
        out = next((f for f in folders if Record(f).matches(config, study.grows)), None)
        if out is None:
            raise LabError(
                f"--resume: no folder {RUNS_FOLDER}/*-compare-{study.dataset} was made with these "
                "options; leave --resume out to begin one, or name it with --out"
            )
    study = study.spelled_as(Record(out))
    return study, Record.reopen(out, study.config() | fingerprint, study.grows)


def report(record: Record, console: Console) -> None:
    """Table, picture and one sentence, of what is finished."""
    lines = final_runs(Classification, record)
    rows = summary.summarise(lines, trial_runs(Classification, record))
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
