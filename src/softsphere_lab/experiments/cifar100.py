"""CIFAR-100: a hundred classes, where the paper finds softmax a little better."""

from __future__ import annotations

from softsphere_lab.experiments.cifar10 import DIFFERENCES, studies
from softsphere_lab.experiments.experiment import StudyExperiment
from softsphere_lab.experiments.image_sections import tell

__all__ = ["EXPERIMENT"]

EXPERIMENT = StudyExperiment(
    name="cifar100",
    title="CIFAR-100",
    claim="With a hundred classes softmax is a little ahead (arXiv:1511.05042).",
    differences=DIFFERENCES,
    studies=studies("cifar100"),
    tell=tell,
)
