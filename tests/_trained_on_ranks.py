"""Language models that ranks train together, with the numbers of one process, and resumed ones."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from _lab_studies import TEXT, untimed
from softsphere.parallel import count_traffic
from softsphere_lab.experiments.on_text.language_modelling import LanguageModelling
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.checkpoint import Checkpoint, CheckpointOfRank
from softsphere_lab.training import run
from softsphere_lab.training.language_run import LanguageRun

# Dropout, clipping, warm-up, and batches that three ranks cannot share evenly: 130 rows, and 2.
SETUP = replace(
    TEXT.setup,
    embedding=4,
    hidden=8,
    width=8,
    batch_size=130,
    epochs=2,
    clip=0.05,
    warm_up=0.2,
    dropout=0.2,
    length=4,
)
ROWS = 4 * 130 + 2
OUTPUTS = (
    "taylor_softmax prior",
    "taylor_softmax factored rate=0.1 prior",
    # most of the batches of a rank have no word of the last cluster
    "adaptive_softmax cutoffs=20,280 div_value=2.0",
    "z_loss lstm",
)
OTHERS = ("softmax prior", "hierarchical_softmax", "squared_error", "softmax lstm")
# The optimizer of the first has a state for rows of the rank.
RESUMED = ("taylor_softmax prior", "taylor_softmax factored rate=0.1 prior")


@functools.cache
def data():
    whole = TEXT.load()
    return replace(whole, text=whole.text.first(ROWS).held(70))


def made(name, group=None):
    one = LanguageRun(data().text, Output.parse(name), 3e-3, 5, SETUP, group=group)
    whole = name.startswith(("softmax", "adaptive", "hierarchical")) or group is None
    # the numbers would be the same if each rank had all classes
    assert whole == (getattr(one.head, "shards", None) is None)
    return one


def seen(one):
    """The epochs, the end and the weights of a run."""
    end = one.final(data(), read_test=True)
    end = {key: value for key, value in vars(end).items() if key != "engine"}
    return untimed([vars(epoch) for epoch in one.history]), untimed(end), one.weights()


def train(name, kept=None, group=None):
    one = made(name, group)
    one.train(SETUP.epochs, kept or Checkpoint())
    return seen(one)


class Ending(LanguageModelling):
    """A study whose last process is killed when it begins with the second seed."""

    def train(self, task, data, kept, on_epoch):
        if task.seed == self.seeds[1] and self.nproc > 1 and distributed.get_rank():
            os.kill(os.getpid(), signal.SIGKILL)
        with count_traffic() as traffic:
            found = super().train(task, data, kept, on_epoch)
        # the numbers would be the same if each process trained alone
        assert bool(traffic.messages) == (self.nproc > 1)
        return found


class Failing(LanguageModelling):
    """A study one process of which fails."""

    def train(self, task, data, kept, on_epoch):
        if distributed.get_rank():
            raise ArithmeticError("a fault of the lab")
        return super().train(task, data, kept, on_epoch)


class StoppedError(Exception):
    """After an epoch."""


def stop(epoch, epochs):
    raise StoppedError


def begin(name, kept, group=None):
    """Trains one epoch, and keeps the state."""
    try:
        made(name, group).train(SETUP.epochs, kept, stop)
    except StoppedError:
        return
    raise AssertionError("was not stopped")


def on_ranks(rank, size, folder):
    """Goes on with what one process has begun, and begins runs for it; trains the other outputs."""
    begin_on_ranks()
    group, folder, found = distributed.group.WORLD, Path(folder), {}
    for name in RESUMED:
        begin(name, CheckpointOfRank(folder / f"{name}.ranks", rank), group)
        found[f"{name} resumed"] = train(name, CheckpointOfRank(folder / name, rank), group)
    found |= {name: train(name, group=group) for name in OUTPUTS}
    torch.save(found, folder / f"found-{rank}")


def others_on_ranks(rank, size, folder):
    begin_on_ranks()
    found = {name: train(name, group=distributed.group.WORLD) for name in OTHERS}
    torch.save(found, Path(folder) / f"found-{rank}")


def begin_on_ranks():
    torch.set_default_dtype(torch.float64)
    run.FEWEST_STEPS = 1
