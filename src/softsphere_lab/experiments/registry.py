"""The experiments by name; a new one is its module and a line here."""

from __future__ import annotations

from softsphere_lab.experiments.experiment import Experiment, Reproduction
from softsphere_lab.experiments.on_engines import engines, scaling, twins
from softsphere_lab.experiments.on_images import cifar10, cifar100, comparison, mnist
from softsphere_lab.experiments.on_items import gowalla
from softsphere_lab.experiments.on_text import (
    ablation,
    classes,
    clusters,
    ptb,
    rate_sweep,
    wikipedia,
)
from softsphere_lab.records.folder import Record

__all__ = ["REPRODUCTIONS", "experiment_of"]

REPRODUCTIONS: dict[str, Reproduction] = {
    experiment.name: experiment
    for experiment in (
        mnist.EXPERIMENT,
        cifar10.EXPERIMENT,
        cifar100.EXPERIMENT,
        ptb.EXPERIMENT,
        wikipedia.EXPERIMENT,
        ablation.EXPERIMENT,
        classes.EXPERIMENT,
        clusters.PTB,
        clusters.WIKIPEDIA,
        clusters.LSTM,
        gowalla.EXPERIMENT,
        scaling.EXPERIMENT,
        engines.EXPERIMENT,
        twins.FLOAT32,
        twins.FLOAT64,
    )
}

# The experiments that a command of their own runs.
COMMANDS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (comparison.COMPARISON, rate_sweep.RATE_FINDER)
}


def experiment_of(record: Record) -> Experiment | None:
    """Returns the experiment that a record is of, or None if it is of none of these."""
    name = (record.config() or {}).get("experiment")
    return COMMANDS.get(str(name)) or REPRODUCTIONS.get(str(name))
