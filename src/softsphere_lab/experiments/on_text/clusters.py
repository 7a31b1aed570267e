"""Clustered output layers beside softmax: how much of its perplexity they reach, at which cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_text.clusters_section import clusters_section
from softsphere_lab.experiments.on_text.language_modelling import LanguageModelling
from softsphere_lab.models.output_layers import Output
from softsphere_lab.study.search import Axis
from softsphere_lab.training.language_run import Setup

__all__ = ["LSTM", "PTB", "WIKIPEDIA"]


def _clustered(loss: str, clusters: int, shortlist: int = 1000, **options: Any) -> Output:
    """Returns an output layer with clusters."""
    return Output(loss, clusters=clusters, shortlist=shortlist, **options)


ONE_TAIL = _clustered("taylor_softmax", 1)
# On Penn Treebank: the layer that is put forward, and those that it has to be compared with.
MAIN = (
    Output("softmax", prior=True),
    Output("adaptive_softmax", prior=True, cutoffs=(2000,), div_value=1.0),
    ONE_TAIL,
    _clustered("taylor_softmax", 256),
    # with the shortlist of adaptive softmax, and with a projection as its tail has one
    _clustered("taylor_softmax", 256, shortlist=2000),
    _clustered("taylor_softmax", 256, shortlist=2000, leaf_features=128),
)
OTHERS = (
    Output("softmax"),
    Output("adaptive_softmax"),
    Output("adaptive_softmax", cutoffs=(2000,), div_value=1.0),
    Output("sampled_softmax", prior=True, samples=1024),
    Output("taylor_softmax", prior=True),
)
NARROWED = Output("adaptive_softmax", prior=True, cutoffs=(1000, 4000), div_value=2.0)
SWEEP = (
    NARROWED,
    _clustered("softmax", 256),
    *(_clustered("taylor_softmax", clusters) for clusters in (16, 64, 128)),
    *(_clustered("taylor_softmax", clusters, by="frequency") for clusters in (16, 64, 128, 256)),
)
# What the budget small runs beside MAIN, with one seed.
SMALL = (
    NARROWED,
    _clustered("softmax", 256),
    Output("sampled_softmax", prior=True, samples=1024),
    *(_clustered("taylor_softmax", clusters) for clusters in (16, 64)),
    *(_clustered("taylor_softmax", clusters, by="frequency") for clusters in (16, 64, 256)),
)
# The softmax of Wikipedia takes most of the time, so that it has one seed at the budget small.
WIKIPEDIA_SOFTMAX = (Output("softmax", prior=True),)
WIKIPEDIA_MAIN = (
    Output("adaptive_softmax", prior=True, cutoffs=(4000, 20_000), div_value=2.0),
    Output("sampled_softmax", prior=True, samples=1024),
    _clustered("taylor_softmax", 256, shortlist=2000),
)
WIKIPEDIA_OTHERS = (
    Output("taylor_softmax", prior=True),
    Output("hierarchical_softmax"),
)
WIKIPEDIA_SWEEP = (
    _clustered("softmax", 256, shortlist=2000),
    *(_clustered("taylor_softmax", clusters, shortlist=2000) for clusters in (1, 64)),
)
RECURRENT = (
    Output("softmax", prior=True, lstm=True, tied=True),
    Output("adaptive_softmax", prior=True, lstm=True, tied=True, cutoffs=(2000,), div_value=1.0),
    Output("sampled_softmax", prior=True, lstm=True, tied=True, samples=1024),
    _clustered("taylor_softmax", 256, lstm=True, tied=True),
    _clustered("softmax", 256, lstm=True, tied=True),
)

FULL = LanguageModelling(
    dataset="ptb",
    outputs=(*MAIN, *OTHERS, *SWEEP),
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
    rates=Axis((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), 4e-3),
    trial_epochs=1,
)
ON_WIKIPEDIA = replace(
    FULL,
    dataset="wikipedia",
    outputs=(
        *WIKIPEDIA_SOFTMAX,
        Output("softmax"),
        *WIKIPEDIA_MAIN,
        *WIKIPEDIA_OTHERS,
        *WIKIPEDIA_SWEEP,
    ),
    setup=replace(FULL.setup, batch_size=1024, epochs=2, held=100_000),
    trial_words=2_000_000,
)
WITH_LSTM = replace(
    FULL,
    outputs=RECURRENT,
    setup=Setup(
        embedding=650,
        width=650,
        layers=2,
        recurrent_dropout=0.5,
        context=64,
        carried=True,
        batch_size=640,
        epochs=40,
        warm_up=0.02,
        clip=0.25,
        optimizer="sgd",
    ),
    rates=Axis((5.0, 10.0, 20.0), 20.0),
    trial_epochs=4,
)

SMOKE = replace(
    FULL,
    dataset="generated",
    outputs=(
        Output("softmax"),
        Output("softmax", prior=True),
        Output("adaptive_softmax"),
        *(_clustered("taylor_softmax", clusters, shortlist=50) for clusters in (1, 8, 16)),
        _clustered("taylor_softmax", 16, shortlist=50, by="frequency"),
        _clustered("softmax", 16, shortlist=50),
    ),
    seeds=(0,),
    setup=replace(FULL.setup, embedding=8, hidden=16, width=16, batch_size=256, epochs=2),
    rates=Axis.fixed(1e-2),
)
SMOKE_WIKIPEDIA = replace(
    SMOKE,
    outputs=(
        Output("softmax", prior=True),
        Output("sampled_softmax", prior=True, samples=50),
        _clustered("taylor_softmax", 16, shortlist=50),
    ),
    setup=replace(SMOKE.setup, epochs=1),
)
SMOKE_LSTM = replace(
    SMOKE,
    outputs=(
        Output("softmax", prior=True, lstm=True, tied=True),
        _clustered("taylor_softmax", 16, shortlist=50, lstm=True, tied=True),
    ),
    setup=replace(WITH_LSTM.setup, embedding=8, width=8, context=4, batch_size=256, epochs=1),
)

DIFFERENCES = (
    "The clusters are no paper's. Clusters by meaning are made by `softsphere.clusters` from the "
    "words that are trained on. Trials are shorter than final runs, so that the rate that is best "
    "in trials need not be best in a final run. "
)

PTB = StudyReproduction(
    name="clusters",
    title="Clusters on Penn Treebank",
    claim=(
        "A softmax over the commonest words and over clusters of the others, with a spherical "
        "distribution within each cluster, has at most 1.02 times the perplexity of softmax; "
        "no paper claims it."
    ),
    differences=(
        DIFFERENCES
        + "The network is wider than that of the other experiments on this text, and trained for "
        "longer. At the budget small fewer layers are run, some of them with one seed."
    ),
    studies={
        "smoke": SMOKE,
        "small": replace(
            FULL,
            outputs=(*MAIN, *SMALL),
            setup=replace(FULL.setup, epochs=4),
            once=(*SMALL, ONE_TAIL),
        ),
        "full": FULL,
    },
    section_of=clusters_section,
)

WIKIPEDIA = StudyReproduction(
    name="clusters_wikipedia",
    title="Clusters on Wikipedia",
    claim=(
        "With some 75,000 words clusters by meaning have no higher perplexity than softmax after "
        "as many words of text, in a fraction of the time; no paper claims it."
    ),
    differences=(
        DIFFERENCES + "At the budget small the network reads a tenth of the text, and softmax and "
        "some other layers have one seed."
    ),
    studies={
        "smoke": SMOKE_WIKIPEDIA,
        "small": replace(
            ON_WIKIPEDIA,
            outputs=(*WIKIPEDIA_SOFTMAX, *WIKIPEDIA_MAIN, *WIKIPEDIA_OTHERS),
            setup=replace(ON_WIKIPEDIA.setup, train=1_000_000, epochs=1, held=20_000),
            trial_words=150_000,
            once=(*WIKIPEDIA_SOFTMAX, *WIKIPEDIA_OTHERS),
        ),
        "full": ON_WIKIPEDIA,
    },
    section_of=clusters_section,
)

LSTM = StudyReproduction(
    name="clusters_lstm",
    title="Clusters on an LSTM",
    claim=(
        "On a network that is far better than the n-gram model, clusters by meaning are as near "
        "softmax as they are there; no paper claims it."
    ),
    differences=(
        DIFFERENCES
        + "The search ends at a rate of 20, since short trials of some layers prefer higher rates, "
        "with which they learn more slowly in a long run. At the budget small the network is "
        "narrower and has one seed."
    ),
    studies={
        "smoke": SMOKE_LSTM,
        "small": replace(
            WITH_LSTM,
            seeds=(0,),
            setup=replace(
                WITH_LSTM.setup,
                embedding=256,
                width=256,
                recurrent_dropout=0.4,
                batch_size=512,
                epochs=14,
            ),
            trial_words=300_000,
            trial_epochs=2,
        ),
        "full": WITH_LSTM,
    },
    section_of=clusters_section,
)
