"""Seconds, measured so that they can be compared.

A machine that does other work besides is noisy: only ratios of times that were taken in turn mean
anything.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softsphere_lab.timing.setting import Setting

__all__ = [
    "Effort",
    "Run",
    "in_turn",
    "milliseconds",
    "paired_ratio",
    "seconds_of",
    "step_times",
    "wait_for",
]

Run = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long something is timed: for `seconds`, but for `fewest` to `most` steps.

    warm_up: the number of steps before, which are not timed.
    """

    seconds: float = 12.0
    warm_up: int = 3
    fewest: int = 5
    most: int = 500


def wait_for(device: torch.device | str) -> None:
    """Waits until a GPU has done all its work; does nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Run, device: torch.device | str = "cpu") -> float:
    """Returns the seconds that one call takes."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def step_times(
    step: Callable[[Tensor, Tensor], Any],
    setting: Setting,
    effort: Effort,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Returns the seconds of each step on new random rows, which are drawn outside the clock."""
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(effort.warm_up):
        step(*setting.batch(generator))
    times: list[float] = []
    end = time.perf_counter() + effort.seconds
    while len(times) < effort.fewest or (time.perf_counter() < end and len(times) < effort.most):
        batch = setting.batch(generator)
        times.append(seconds_of(partial(step, *batch), device))
    return times


def in_turn(
    runs: Mapping[str, Run],
    turns: int | Callable[[float], int],
    device: torch.device | str = "cpu",
) -> dict[str, list[float]]:
    """Returns the seconds of each run in every turn, after one turn of warm-up.

    The runs of a turn come in random order, since what one leaves in the caches would otherwise
    always be found by the same other one.

    turns: their number, or a function of the seconds that the longest run took in the warm-up.
    """
    longest = max(seconds_of(run, device) for run in runs.values())
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns if isinstance(turns, int) else turns(longest)):
        for name in order.sample(list(runs), len(runs)):
            times[name].append(seconds_of(runs[name], device))
    return times


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Returns the median of the ratios, turn by turn.

    >>> paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def milliseconds(seconds: float) -> str:
    """
    >>> milliseconds(0.0020554), milliseconds(1.21307)
    ('2.06', '1,213')
    """
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"
