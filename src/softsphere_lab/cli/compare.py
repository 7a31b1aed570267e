"""`softsphere compare`: a user's own comparison of losses on one set of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from softsphere_lab.cli.arguments import (
    MOST_EPOCHS,
    MOST_SEEDS,
    DataDir,
    Device,
    Epochs,
    Jobs,
    Resume,
    Seeds,
    at_least_one,
    folder,
    html_file,
    out_option,
    positive,
    share_cores,
    usable,
)
from softsphere_lab.cli.run_folders import Place, run_and_report
from softsphere_lab.data import images as data
from softsphere_lab.experiments.on_images.classification import RATES, Classification
from softsphere_lab.experiments.on_images.comparison import COMPARISON
from softsphere_lab.models import image_networks as models
from softsphere_lab.progress import print_plain
from softsphere_lab.records.files import write
from softsphere_lab.records.folder import Record
from softsphere_lab.study.search import Axis
from softsphere_lab.study.spec import LossSpec, distinct
from softsphere_lab.training.image_run import Schedule

__all__ = ["compare"]

DEFAULT_LOSSES = "softmax,taylor_softmax,spherical_softmax,z_loss,squared_error"


def compare(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(data.DATASETS)}.")] = "digits",
    losses: Annotated[
        str,
        typer.Option(
            help="Names with their numbers, as in softmax,z_loss:a=1:b=4; `softsphere losses` "
            "lists them."
        ),
    ] = DEFAULT_LOSSES,
    seeds: Seeds = 5,
    epochs: Epochs = 20,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(models.MODELS)}.")] = "mlp",
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 128,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Adam's learning rate. It is fixed when it is given, also with --tune; without it "
            "it is 0.001, or what --tune finds."
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Search for the learning rate (unless --lr is given) and for a loss's own "
            "numbers, on validation data.",
        ),
    ] = False,
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Annotated[Path | None, out_option("runs/TIME-compare-DATASET")] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            parser=folder,
            metavar="FILE",
            help="Also write the results as one page for a browser, which loads nothing else.",
        ),
    ] = None,
    resume: Resume = False,
    jobs: Jobs = 1,
) -> None:
    """Train one network with each loss and each seed, and say which loss is better."""
    given = positive("--lr", lr)
    page = html and html_file("--html", html, out)
    study = Classification(
        dataset=dataset,
        losses=distinct(map(LossSpec.parse, losses.split(",")), tune),
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
    share_cores(jobs)
    prepared = COMPARISON.prepare(study)
    if tune and given is not None:
        typer.echo(_fixed_rate_sentence(study, given))

    def also(record: Record, console: Console) -> None:
        text = page and COMPARISON.web_page(record)
        if page and text:
            write(page, text)
            print_plain(console, f"Page: {page}")

    run_and_report(prepared, Place.of_command(f"compare-{dataset}"), out, resume, jobs, also)


def _fixed_rate_sentence(study: Classification, rate: float) -> str:
    """Returns a sentence about what is searched for when the learning rate is given."""
    searched = {key: None for spec in study.losses for key in spec.axes(True)}
    what = f"searches for {', '.join(searched)} alone" if searched else "has nothing to search for"
    return f"--lr {rate:g} fixes the learning rate of every loss, so --tune {what}."
