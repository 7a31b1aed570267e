"""How long is a step of sharded output layers on two processes, and how much do they send?

    python benchmarks/two_processes.py

Each process has one thread and half of the classes and of the rows. Vocabulary-parallel softmax is
`torch.distributed.tensor.parallel.loss_parallel` on the same processes. The layers of a turn come
one after the other, in processes of their own; a ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from functools import partial

from softsphere_lab.timing.benchmark import Case, Row, left_out, run
from softsphere_lab.timing.clock import Effort, paired_ratio
from softsphere_lab.timing.over_ranks import measured_on_ranks
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.sharded_steps import CLUSTERED, FACTORED, GRAM, SHARDED, SOFTMAX
from softsphere_lab.timing.training_steps import SHARE, memory

RANKS, TURNS = 2, 3
OURS = (GRAM, CLUSTERED, FACTORED)
NAMES = {
    GRAM: "linear Taylor, gram (ours)",
    CLUSTERED: "clustered Taylor (ours)",
    FACTORED: "factored Taylor (ours)",
    SOFTMAX: "vocabulary-parallel softmax",
}
TIMED = tuple(Setting(D=D, d=128, m=512) for D in (100_000, 1_000_000))
SENT = tuple(Setting(D=10**power, d=128, m=512) for power in range(4, 8))


def compared(setting: Setting, turns: int, effort: Effort) -> Iterator[Row]:
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(turns):
        for name in NAMES:
            times[name].append(measured_on_ranks(name, setting, effort, RANKS)["seconds"])
    for name, label in NAMES.items():
        yield Row(label, setting, "seconds", statistics.median(times[name]))
    for name in OURS:
        ratio = paired_ratio(times[SOFTMAX], times[name])
        yield Row(NAMES[SOFTMAX], setting, f"times {NAMES[name]}", ratio)


def counted(name: str, setting: Setting) -> Iterator[Row]:
    kind = SHARDED[name]
    least = RANKS * (kind.kept(setting, RANKS) + kind.at_work(setting, RANKS))
    if least > SHARE * memory():
        yield left_out(NAMES[name], setting, f"it takes {least / 1e9:.3g} GB")
        return
    found = measured_on_ranks(name, setting, Effort(warm_up=1, most=1), RANKS)
    yield Row(NAMES[name], setting, "messages of a step", found["messages"])
    yield Row(NAMES[name], setting, "bytes that a rank gives to them", found["bytes"])


def cases(options: argparse.Namespace) -> list[Case]:
    timed, sent, turns, effort = TIMED, SENT, TURNS, Effort(warm_up=1, most=4)
    if options.smoke:
        timed, sent = (Setting(D=200, d=8, m=16),), (Setting(D=100, d=8, m=16),)
        turns, effort = 1, Effort(warm_up=1, most=1)
    return [
        *(Case(f"seconds, {s}", partial(compared, s, turns, effort)) for s in timed),
        *(Case(f"{name}, {s}", partial(counted, name, s)) for s in sent for name in OURS),
    ]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
