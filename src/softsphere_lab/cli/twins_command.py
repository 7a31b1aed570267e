"""`softsphere twins`: is the factored layer's training that of a dense one, and how much faster?"""

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
    share,
    spherical,
    usable,
)
from softsphere_lab.data import text
from softsphere_lab.experiments import twins as lab_twins
from softsphere_lab.experiments.side_by_side import perform

__all__ = ["twins"]


def twins(
    data_dir: DataDir = None,
    dataset: Text = "ptb",
    loss: SphericalLoss = "taylor_softmax",
    prior: BaseMeasure = True,
    n: Annotated[int, typer.Option("--n", help="Words of an n-gram.")] = 5,
    embedding: Embedding = 64,
    width: Annotated[int, typer.Option(help="Width d of what the output layer sees.")] = 128,
    batch_size: Annotated[int, typer.Option(help="N-grams in a step.")] = 256,
    epochs: Epochs = 3,
    lr: Annotated[float, typer.Option(help="Rate of the output layer, in classes D.")] = 0.01,
    momentum: Annotated[float, typer.Option(help="Momentum of the output layer.")] = 0.0,
    trunk_lr: Annotated[float, typer.Option(help="SGD's rate for the layers below.")] = 0.05,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/TIME-twins-DATASET.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Do what is missing in --out.")] = False,
) -> None:
    """Train one n-gram model with the factored layer and with a dense one under the same SGD."""
    plan = lab_twins.Plan(
        dataset=dataset,
        loss=spherical(loss),
        prior=prior,
        n=at_least("--n", n, 2),
        embedding=at_least_one("--embedding", embedding),
        width=at_least_one("--width", width),
        batch_size=at_least_one("--batch-size", batch_size),
        epochs=at_least_one("--epochs", epochs),
        lr=positive("--lr", lr) or lr,
        momentum=share("--momentum", momentum),
        trunk_lr=positive("--trunk-lr", trunk_lr) or trunk_lr,
        seed=at_least("--seed", seed, 0),
        device=usable(device),
        dtype=known_dtype(dtype),
    )
    words = text.load(dataset, data_dir)
    perform(
        "twins",
        asdict(plan),
        lab_twins.ENGINES,
        lambda engine, on_step: lab_twins.run(plan, engine, words, on_step),
        title=f"{dataset}, {loss}, n = {n}, d = {width}, m = {batch_size}, {dtype}",
        out=out,
        resume=resume,
    )
