"""How many times longer than a clustered layer does each other output layer take to train a step?

    python benchmarks/clustered_vs_other_layers.py

Everything is counted: forward, backward and update by SGD. The clustered layer has a shortlist of
2,000 classes and 256 clusters, or 1,024 from half a million classes on; the clusters are of equal
sizes. The gradient of its leaves is sparse. Each layer is timed in a process of its own. Further
lines compare a step with factored leaves at ten million classes with one at a million, and the
exact log-probability of one class for each row with the forward of a training step, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from functools import partial

import torch

from softsphere_lab.timing.benchmark import Case, Row, left_out, run
from softsphere_lab.timing.clock import Effort, in_turn, paired_ratio
from softsphere_lab.timing.processes import measure
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import (
    CLUSTERED,
    CLUSTERS,
    FACTORED_LEAVES,
    LAYERS,
    clustered,
    obstacle,
)

SETTINGS = (Setting(D=74_655, d=128, m=512), Setting(D=1_000_000, d=128, m=512))
OTHERS = ("softmax", "adaptive softmax", "hierarchical softmax", "sampled softmax, 1024")
MANY = Setting(D=10_000_000, d=128, m=512)
TURNS = 30


def compared(setting: Setting, effort: Effort) -> Iterator[Row]:
    ours = measure(CLUSTERED, setting, effort).seconds
    yield Row(CLUSTERED, setting, "seconds", ours)
    for name in (*OTHERS, *CLUSTERS):
        if name == CLUSTERED:
            continue
        reason = obstacle(name, setting) if name in LAYERS else None
        if reason is not None:
            yield left_out(name, setting, reason)
            continue
        seconds = measure(name, setting, effort).seconds
        yield Row(name, setting, "seconds", seconds)
        yield Row(name, setting, "times ours", seconds / ours)


def grown(few: Setting, many: Setting, effort: Effort) -> Iterator[Row]:
    """The time of a step with factored leaves at many classes over that at fewer."""
    pairs = [[measure(FACTORED_LEAVES, s, effort).seconds for s in (few, many)] for _ in range(2)]
    of_few, of_many = map(list, zip(*pairs, strict=True))
    yield Row(FACTORED_LEAVES, many, "seconds", statistics.median(of_many))
    yield Row(FACTORED_LEAVES, many, f"times that at D = {few.D:,}", paired_ratio(of_many, of_few))


def scored(setting: Setting, turns: int) -> Iterator[Row]:
    """The time of the exact log-probabilities of given classes over that of a training forward."""
    head = clustered(setting).head
    hidden, target = setting.batch(torch.Generator().manual_seed(0))
    scores = torch.no_grad()(head)
    times = in_turn(
        {"train": lambda: head(hidden, target), "score": lambda: scores(hidden, target)}, turns
    )
    ratio = paired_ratio(times["score"], times["train"])
    yield Row(CLUSTERED, setting, "log-probability over training forward", ratio)


def cases(options: argparse.Namespace) -> list[Case]:
    settings, effort, turns, many = SETTINGS, Effort(), TURNS, MANY
    if options.smoke:
        settings, effort, turns = (Setting(D=2_500, d=8, m=16),), Effort(0.05, 1, 1), 2
        many = Setting(D=5_000, d=8, m=16)
    few = settings[-1]
    return [
        *(Case(str(setting), partial(compared, setting, effort)) for setting in settings),
        Case(f"factored leaves, D = {few.D:,} and {many.D:,}", partial(grown, few, many, effort)),
        *(
            Case(f"log-probability, {setting}", partial(scored, setting, turns))
            for setting in settings
        ),
    ]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
