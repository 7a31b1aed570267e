"""The engines of the linear layer at one size, timed in turn, and the one that `auto` takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from softsphere.engines import choose
from softsphere_lab.timing.benchmark import Row, left_out
from softsphere_lab.timing.failures import check_device, in_turn_but, reason
from softsphere_lab.timing.linear_losses import ENGINES, LOSSES, ForwardBackward
from softsphere_lab.timing.setting import Setting

__all__ = ["FEW", "HOPELESS", "Place", "compared"]

# An engine is not timed where it has so many times the FLOPs of another, and more than a few.
HOPELESS = 6
FEW = 2e9


@dataclass(frozen=True)
class Place:
    """Where and how the engines are compared.

    memory: the bytes that tensors may take. seconds: how long all engines are timed at a size, in
    `fewest` to `most` turns.
    """

    device: str
    dtype: torch.dtype
    memory: float
    seconds: float
    fewest: int
    most: int

    def turns(self, contestants: int, longest: float) -> int:
        """The number of turns, from the seconds that the longest contestant takes."""
        wanted = int(self.seconds / longest / contestants)
        return max(self.fewest, min(self.most, wanted))

    def contestants(self, setting: Setting) -> list[str]:
        """Those that fit in memory and have a chance of being the fastest, and auto."""
        flops = _flops(setting)
        least, size = min(flops.values()), self.dtype.itemsize
        # outputs, their gradient and one more such tensor; the weight, its gradient and a copy
        fits = 3 * size * (setting.m + setting.d) * setting.D < self.memory
        hopeful = [name for name, count in flops.items() if count < max(HOPELESS * least, FEW)]
        return [name for name in hopeful if fits or name not in ("dense", "logits")] + ["auto"]


def compared(setting: Setting, place: Place, prefix: str = "") -> Iterator[Row]:
    """Measures forward and backward of the contestants, beside a criterion on plain logits.

    prefix: the beginning of the names of the layers in the rows. A layer that raises an error is
    left out. Raises DeviceLostError after the rows, if the error leaves no device to go on with.
    """
    device, dtype = place.device, place.dtype
    torch.manual_seed(0)
    # one weight for all, since several would not fit
    step = ForwardBackward(LOSSES["logits"](), setting, device, dtype)
    hidden, target = setting.batch(torch.Generator(device).manual_seed(0))
    hidden = hidden.detach().to(dtype).requires_grad_()

    names = place.contestants(setting)
    losses = {name: LOSSES[name]() for name in names}

    def taken_by(name: str) -> None:
        step.loss = losses[name]
        step(hidden, target)

    runs = {name: partial(taken_by, name) for name in names}
    times, failed = in_turn_but(runs, partial(place.turns, len(runs)), device)
    for name, error in failed.items():
        yield left_out(prefix + name, setting, reason(error))
    check_device(failed.values(), device)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    for name, seconds in median.items():
        yield Row(prefix + name, setting, "seconds", seconds)
    chosen = choose(setting.m, setting.D, setting.d, dtype, device).engine
    auto = f"{prefix}auto"
    yield Row(auto, setting, "is", chosen)
    engines = [name for name in median if name in ENGINES]
    if not engines:
        return
    fastest = min(engines, key=median.__getitem__)
    yield Row(f"{prefix}best", setting, "is", fastest)
    if "auto" not in median:
        return
    yield Row(auto, setting, "times the best engine", median["auto"] / median[fastest])
    if "logits" in median:
        yield Row(auto, setting, "times plain logits", median["auto"] / median["logits"])


def _flops(setting: Setting) -> dict[str, float]:
    m, D, d = setting.m, setting.D, setting.d
    gram = 4 * (D + m) * d * d
    return {"dense": 6 * m * D * d, "logits": 6 * m * D * d, "chunked": 8 * m * D * d, "gram": gram}
