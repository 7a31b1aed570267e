"""Clustered output layers beside softmax: how much of its perplexity they reach, at which cost."""

from __future__ import annotations

from dataclasses import replace

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_text.language_modelling import LanguageModelling
from softsphere_lab.experiments.on_text.text_sections import text_section
from softsphere_lab.models.output_layers import Output
from softsphere_lab.study.search import Axis
from softsphere_lab.training.language_run import Setup

__all__ = ["EXPERIMENT"]

OUTPUTS = (
    Output("softmax"),
    Output("softmax", prior=True),
    Output("adaptive_softmax"),
    Output("taylor_softmax", prior=True),
)

FULL = LanguageModelling(
    dataset="ptb",
    outputs=OUTPUTS,
    seeds=(0, 1, 2),
    setup=Setup(
        hidden=512,
        dropout=0.2,
        epochs=6,
        linear_last=True,
        warm_up=0.1,
        clip=1.0,
        beta2=0.99,
    ),
    rates=Axis((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), 2e-3),
    trial_epochs=1,
)
SMOKE = replace(
    FULL,
    dataset="generated",
    seeds=(0,),
    setup=replace(FULL.setup, embedding=8, hidden=16, width=16, batch_size=64, epochs=2),
    rates=Axis((3e-3, 1e-2), 3e-3),
)

EXPERIMENT = StudyReproduction(
    name="clusters",
    title="Clusters on Penn Treebank",
    claim=(
        "A softmax over the commonest words and over clusters of the others, with a spherical "
        "distribution within each cluster, has at most 1.02 times the perplexity of softmax; "
        "no paper claims it."
    ),
    differences=(
        "The network is deeper and trained for longer than that of the other experiments on this "
        "text. Trials are shorter than final runs, so that the rate that is best in trials need "
        "not be best in a final run."
    ),
    studies={
        "smoke": SMOKE,
        "small": replace(FULL, setup=replace(FULL.setup, epochs=4), trial_words=300_000),
        "full": FULL,
    },
    section_of=text_section,
)
