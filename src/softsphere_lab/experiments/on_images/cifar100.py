"""CIFAR-100: a hundred classes, where the paper finds softmax a little better."""

from __future__ import annotations

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_images.cifar10 import DIFFERENCES, studies
from softsphere_lab.experiments.on_images.image_sections import image_section

__all__ = ["EXPERIMENT"]

EXPERIMENT = StudyReproduction(
    name="cifar100",
    title="CIFAR-100",
    claim="With a hundred classes softmax is a little ahead (arXiv:1511.05042).",
    differences=DIFFERENCES,
    studies=studies("cifar100"),
    section_of=image_section,
)
