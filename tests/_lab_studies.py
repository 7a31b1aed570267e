"""Small studies of images and of text that tests stop and resume."""

from __future__ import annotations

from softsphere_lab.experiments.on_images.classification import Classification
from softsphere_lab.experiments.on_items.recommendation import Recommendation
from softsphere_lab.experiments.on_text.language_modelling import LanguageModelling
from softsphere_lab.models.output_layers import Output
from softsphere_lab.study.search import Axis
from softsphere_lab.study.spec import LossSpec
from softsphere_lab.training.image_run import Schedule
from softsphere_lab.training.language_run import Setup
from softsphere_lab.training.recommend_run import Setup as SetupOfItems

__all__ = ["IMAGES", "ITEMS", "TEXT", "untimed"]

IMAGES = Classification(
    dataset="digits",
    losses=(LossSpec.parse("taylor_softmax"), LossSpec.parse("softmax")),
    seeds=(0, 1),
    # with all that a schedule can have: dropout in the network, warm-up, decay
    schedule=Schedule("mlp", 3, 256, "cpu", warm_up=0.2, weight_decay=0.1),
    rates=Axis((1e-3, 3e-3), 1e-3),
    trial_epochs=1,
)
TEXT = LanguageModelling(
    dataset="generated",
    outputs=(Output("taylor_softmax"),),
    seeds=(0, 1),
    setup=Setup(embedding=8, hidden=16, width=16, batch_size=128, epochs=3, held=200),
    rates=Axis.fixed(3e-3),
    layer_rates=Axis.fixed(0.1),
    trial_epochs=1,
)

ITEMS = Recommendation(
    dataset="generated",
    outputs=(Output("softmax", prior=True),),
    seeds=(0, 1),
    setup=SetupOfItems(width=8, batch_size=32, epochs=3),
    trial_epochs=1,
    rates=Axis.fixed(3e-2),
)


def untimed(value):
    """Everything that is measured, but for the clock."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if key != "seconds"}
    return [untimed(each) for each in value] if isinstance(value, (list, tuple)) else value
