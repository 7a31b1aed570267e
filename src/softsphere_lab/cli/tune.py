"""`softsphere tune`: the learning rates with which an output layer trains well on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softsphere import losses
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
    out_option,
    positive,
    share_cores,
    usable,
)
from softsphere_lab.cli.run_folders import Place, run_and_report
from softsphere_lab.data.corpora import CORPORA
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.on_text.language_modelling import LAYER_RATES, RATES
from softsphere_lab.experiments.on_text.rate_sweep import RATE_FINDER, RateSweep
from softsphere_lab.models.output_layers import BASELINES, Output
from softsphere_lab.study.search import Axis
from softsphere_lab.training.language_run import Setup

__all__ = ["tune"]

DEFAULT_OUTPUTS = ["softmax", "taylor_softmax", "taylor_softmax factored"]
DEFAULT_RATES = ",".join(f"{rate:g}" for rate in RATES.values)
DEFAULT_LAYER_RATES = ",".join(f"{rate:g}" for rate in LAYER_RATES.values)


def tune(
    dataset: Annotated[
        str, typer.Option(help=f"One of {', '.join(CORPORA)}, or a name in --data-dir.")
    ] = "generated",
    output: Annotated[
        list[str],
        typer.Option(
            help="An output layer, such as 'taylor_softmax prior factored'; can be given again."
        ),
    ] = DEFAULT_OUTPUTS,
    rates: Annotated[
        str,
        typer.Option(
            help="AdamW's rates for a model whose output layer is not factored, as in 0.001,0.01."
        ),
    ] = DEFAULT_RATES,
    layer_rates: Annotated[
        str,
        typer.Option(
            help="FactoredSGD's rates for a factored layer, as multiples of the number of classes."
        ),
    ] = DEFAULT_LAYER_RATES,
    rate_below: Annotated[
        float, typer.Option(help="AdamW's one rate for the network below a factored layer.")
    ] = RATES.start,
    seeds: Seeds = 1,
    epochs: Epochs = 2,
    words: Annotated[
        int | None, typer.Option(help="Words to train on; all of them without it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Words in a step.")] = 256,
    device: Device = "cpu",
    data_dir: DataDir = None,
    out: Annotated[Path | None, out_option("runs/TIME-tune-DATASET")] = None,
    resume: Resume = False,
    jobs: Jobs = 1,
) -> None:
    """Train output layers with each of their rates, and say which rates are good."""
    positive("--rate-below", rate_below)
    study = RateSweep(
        dataset=dataset,
        outputs=tuple(dict.fromkeys(map(Output.parse, _given(output)))),
        seeds=tuple(range(at_least_one("--seeds", seeds, MOST_SEEDS))),
        setup=Setup(
            epochs=at_least_one("--epochs", epochs, MOST_EPOCHS),
            batch_size=at_least_one("--batch-size", batch_size),
            train=None if words is None else at_least_one("--words", words),
            device=usable(device),
        ),
        trial_epochs=epochs,
        rates=_axis("--rates", rates),
        layer_rates=_axis("--layer-rates", layer_rates),
        rate_below=rate_below,
        data_dir=data_dir,
    )
    share_cores(jobs)
    prepared = RATE_FINDER.prepare(study)
    run_and_report(prepared, Place.of_command(f"tune-{dataset}"), out, resume, jobs)


def _given(outputs: list[str]) -> list[str]:
    """Returns the names of output layers. Raises LabError for one that is not known."""
    known = [*losses.REGISTRY, *BASELINES]
    for each in outputs:
        if each.partition(":")[0].partition(" ")[0] not in known:
            raise LabError(
                f"--output begins with one of {', '.join(known)}, as in 'taylor_softmax factored'; "
                f"got {each!r}"
            )
        try:
            _ = Output.parse(each).spec
        except LabError as error:
            raise LabError(f"--output: {str(error).removeprefix('--losses: ')}") from error
    return outputs


def _axis(option: str, text: str) -> Axis:
    """Reads rates in any order. All of them are tried, so it does not matter which is the first."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError as error:
        raise LabError(
            f"{option} must be numbers with commas, as in 0.001,0.01, got {text!r}"
        ) from error
    for rate in found:
        positive(option, rate)
    return Axis(tuple(found), found[0])
