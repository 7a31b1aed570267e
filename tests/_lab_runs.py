"""Runs of every kind that tests stop and resume, and capture."""

from __future__ import annotations

from dataclasses import replace

from _lab_studies import IMAGES, ITEMS, TEXT
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.checkpoint import Checkpoint

__all__ = ["HARMFUL", "RUNS", "Stopping", "loaded", "of_one_epoch"]

# So high that the first epoch is the best, which a run that goes on has to remember.
HARMFUL = 0.3
CLUSTERED = Output("taylor_softmax", clusters=8, shortlist=20)
TIED = replace(CLUSTERED, lstm=True, tied=True)
ON_STREAMS = replace(
    TEXT.setup, embedding=16, layers=2, recurrent_dropout=0.2, context=8, carried=True
)
# What is stopped, and what of it: every kind of output layer has a state of its own.
RUNS = {
    "images": (IMAGES, "taylor_softmax"),
    "images, the first epoch the best": (IMAGES, "softmax"),
    "augmented in bfloat16": (
        replace(
            IMAGES, schedule=replace(IMAGES.schedule, model="lenet", augment=True, bfloat16=True)
        ),
        "softmax",
    ),
    "warm-up, clipping and a linear last layer": (
        replace(TEXT, setup=replace(TEXT.setup, warm_up=0.3, clip=0.1, linear_last=True)),
        "softmax",
    ),
    "an LSTM of two layers with dropout": (
        replace(TEXT, setup=replace(TEXT.setup, layers=2, recurrent_dropout=0.2, context=8)),
        "softmax lstm",
    ),
    **{
        f"an LSTM on streams of text, {name}": (
            replace(TEXT, setup=ON_STREAMS),
            f"{name} lstm tied",
        )
        for name in ("softmax", "adaptive_softmax div_value=1.0")
    },
    "an LSTM under SGD": (
        replace(TEXT, setup=replace(ON_STREAMS, optimizer="sgd", clip=0.25, warm_up=0.02)),
        "softmax lstm tied",
    ),
    "tied clusters": (replace(TEXT, outputs=(TIED,), setup=ON_STREAMS), str(TIED)),
    **{
        name: (TEXT, name)
        for name in (
            "softmax",
            "taylor_softmax prior",
            "taylor_softmax factored rate=0.1",
            "taylor_softmax prior factored rate=0.1",
            "z_loss",
            "adaptive_softmax",
            "hierarchical_softmax",
            "sampled_softmax prior samples=20",
            "taylor_softmax lstm",
            "softmax depth=1 activation=batchnorm",
            "softmax classes=50",
        )
    },
    "clusters": (replace(TEXT, outputs=(CLUSTERED,)), str(CLUSTERED)),
    "items": (ITEMS, "softmax prior"),
    "items and a factored layer": (ITEMS, "taylor_softmax prior factored rate=0.1"),
}


def loaded(asked, folder):
    """The data of a study, with what is made from it."""
    return asked.furnished(asked.load(), folder)


def of_one_epoch(asked):
    if isinstance(asked, type(IMAGES)):
        return replace(asked, schedule=replace(asked.schedule, epochs=1))
    return replace(asked, setup=replace(asked.setup, epochs=1))


class Stopping(Checkpoint):
    """Is stopped when it has saved so many times."""

    saves = 0

    def save(self, state):
        super().save(state)
        self.saves -= 1
        if not self.saves:
            raise KeyboardInterrupt
