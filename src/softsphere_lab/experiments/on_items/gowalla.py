"""Gowalla: 40,981 places and who visited them, with the output layers of a recommender."""

from __future__ import annotations

from dataclasses import replace

from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_items.item_sections import item_section
from softsphere_lab.experiments.on_items.recommendation import Recommendation
from softsphere_lab.models.output_layers import Output
from softsphere_lab.study.search import Axis
from softsphere_lab.training.recommend_run import Setup

__all__ = ["EXPERIMENT"]

MAIN = (
    Output("softmax", prior=True, tied=True),
    Output("sampled_softmax", prior=True, tied=True, samples=1024),
    Output("z_loss:a=1:b=8", tied=True),
    Output("taylor_softmax", prior=True, factored=True),
    Output("taylor_softmax", tied=True, clusters=256),
    Output("softmax", tied=True, clusters=256),
)
OTHERS = (
    Output("softmax", prior=True),
    Output("sampled_softmax", prior=True, samples=1024),
    Output("z_loss:a=1:b=8"),
    Output("taylor_softmax", clusters=256),
    Output("softmax", clusters=256),
    Output("squared_error"),
)

FULL = Recommendation(
    dataset="gowalla",
    outputs=(*MAIN, *OTHERS),
    seeds=(0, 1, 2),
    setup=Setup(epochs=40),
    trial_epochs=10,
)

EXPERIMENT = StudyReproduction(
    name="gowalla",
    title="A recommender on Gowalla",
    claim=(
        "No paper compares spherical and clustered output layers with softmax and sampled softmax "
        "in a recommender. Here they have the same network and the same search."
    ),
    differences=(
        "The published methods of the table have networks of their own. The split is that of He et "
        "al. 2020 (LightGCN, arXiv:2002.02126), which has no validation part: its training part is "
        "the training and validation parts here. The network, its numbers and the number of epochs "
        "were chosen on the validation part with sampled softmax; its width, tying and the numbers "
        "of the Z-loss with that loss. Trials are shorter than final runs, so that the rate that "
        "is best in trials need not be best in a final run. The embeddings of the items are the "
        "rows of a tied layer's weight."
    ),
    studies={
        "smoke": replace(
            FULL,
            dataset="generated",
            outputs=(
                Output("softmax", prior=True, tied=True),
                Output("z_loss:a=1:b=2", tied=True),
                Output("taylor_softmax", clusters=8, shortlist=10),
                Output("squared_error"),
            ),
            seeds=(0,),
            setup=Setup(width=8, batch_size=32, epochs=2),
            trial_epochs=1,
            rates=Axis.fixed(3e-2),
            layer_rates=Axis.fixed(0.1),
            unobserved=Axis.fixed(0.1),
        ),
        "small": replace(FULL, outputs=MAIN, seeds=(0,), setup=Setup(epochs=20), trial_epochs=4),
        "full": FULL,
    },
    section_of=item_section,
)
