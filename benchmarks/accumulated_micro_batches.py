"""How many times faster are eight micro-batches within `head.accumulate()` than without?

    python benchmarks/accumulated_micro_batches.py

Within it the Gram engine forms its matrix once for all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

import torch

from softsphere import LinearSphericalLoss, LinearSphericalOptions
from softsphere_lab.timing.benchmark import Case, Row, run
from softsphere_lab.timing.clock import in_turn, paired_ratio
from softsphere_lab.timing.setting import Setting

MICRO_BATCHES, TURNS = 8, 3
SETTINGS = (Setting(D=100_000, d=512, m=256), Setting(D=262_144, d=256, m=256))


def compared(setting: Setting) -> Iterator[Row]:
    options = LinearSphericalOptions(engine="gram")
    head = LinearSphericalLoss(setting.d, setting.D, "taylor_softmax", options=options)
    generator = torch.Generator().manual_seed(0)
    batches = [setting.batch(generator) for _ in range(MICRO_BATCHES)]

    def apart() -> None:
        head.zero_grad()
        for hidden, target in batches:
            (head(hidden, target) / MICRO_BATCHES).backward()

    def together() -> None:
        head.zero_grad()
        with head.accumulate():
            for hidden, target in batches:
                (head(hidden, target) / MICRO_BATCHES).backward()

    times = in_turn({"apart": apart, "together": together}, TURNS)
    faster = paired_ratio(times["apart"], times["together"])
    yield Row("gram", setting, "times faster within accumulate()", faster)


def cases(options: argparse.Namespace) -> list[Case]:
    settings = (Setting(D=500, d=8, m=16),) if options.smoke else SETTINGS
    return [Case(str(setting), partial(compared, setting)) for setting in settings]


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, cases))
