"""`softsphere engines`: do all engines of the linear layer train alike, and how fast is each?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from softsphere_lab.cli.arguments import (
    BaseMeasure,
    DataDir,
    Device,
    Dtype,
    Embedding,
    Epochs,
    Seed,
    SphericalLoss,
    Text,
    at_least,
    at_least_one,
    known_dtype,
    positive,
    spherical,
    usable,
)
from softsphere_lab.data import text
from softsphere_lab.experiments import engines as lab_engines
from softsphere_lab.experiments.side_by_side import perform

__all__ = ["engines"]


def engines(
    data_dir: DataDir = None,
    dataset: Text = "ptb",
    loss: SphericalLoss = "taylor_softmax",
    prior: BaseMeasure = True,
    length: Annotated[int, typer.Option(help="Words of a window of text.")] = 32,
    embedding: Embedding = 64,
    width: Annotated[int, typer.Option(help="Width d of the LSTM and of the output layer.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = 32,
    epochs: Epochs = 2,
    lr: Annotated[float, typer.Option(help="AdamW's rate for all layers.")] = 0.003,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/TIME-engines-DATASET.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Do what is missing in --out.")] = False,
) -> None:
    """Train one LSTM with AdamW and the linear output layer by each of its engines."""
    plan = lab_engines.Plan(
        dataset=dataset,
        loss=spherical(loss),
        prior=prior,
        length=at_least_one("--length", length),
        embedding=at_least_one("--embedding", embedding),
        width=at_least_one("--width", width),
        batch_size=at_least_one("--batch-size", batch_size),
        epochs=at_least_one("--epochs", epochs),
        lr=positive("--lr", lr) or lr,
        seed=at_least("--seed", seed, 0),
        device=usable(device),
        dtype=known_dtype(dtype),
    )
    words = text.load(dataset, data_dir)
    perform(
        "engines",
        asdict(plan),
        lab_engines.engines(device),
        lambda engine, on_step: lab_engines.run(plan, engine, words, on_step),
        title=f"{dataset}, {loss}, d = {width}, m = {batch_size * length}, AdamW, {dtype}",
        out=out,
        resume=resume,
    )
