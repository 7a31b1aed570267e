"""The experiments by name; a new one is its module and a line here."""

from __future__ import annotations

from softsphere_lab.experiments import (
    ablation,
    cifar10,
    cifar100,
    classes,
    mnist,
    ptb,
    scaling,
    wikipedia,
)
from softsphere_lab.experiments.experiment import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (mnist, cifar10, cifar100, ptb, wikipedia, ablation, classes, scaling)
}
