"""Heads of language models and recommenders, each measured in every respect."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere import SphericalLoss
from softsphere_lab.timing.after_training import trained_batch
from softsphere_lab.timing.captured_calls import Capture, captured_on_cuda
from softsphere_lab.timing.clock import Effort, seconds_of
from softsphere_lab.timing.exact_gradients import gradient_errors
from softsphere_lab.timing.linear_losses import LOSS, LOSSES, LinearLoss
from softsphere_lab.timing.memory import extra_bytes
from softsphere_lab.timing.setting import Setting

__all__ = [
    "BFLOAT16",
    "CAPTURED",
    "MILLISECONDS",
    "OURS",
    "PRECISIONS",
    "Found",
    "head_measures",
    "measures_of",
]

# The engines of this library that are measured.
OURS = ("gram", "chunked")
# How a head computes: in bfloat16, or in float32 at one of PyTorch's precisions of its products.
BFLOAT16 = "bfloat16"
PRECISIONS = (BFLOAT16, "highest", "high", "medium")

MILLISECONDS, CAPTURED = "milliseconds", "milliseconds, captured"
MEMORY, WITH_ADAMW = "extra MiB", "milliseconds with AdamW"
BY_HIDDEN, BY_WEIGHT = "error of the gradient by hidden", "error of the gradient by weight"
SHARE = "share of the product rate"
# A graph must compute the gradient that it was captured from, up to the order of sums in bfloat16.
SAME = 0.02


class Found(NamedTuple):
    """A number, or in words why there is none."""

    measure: str
    value: float | str


def measures_of(name: str, device: str) -> tuple[str, ...]:
    """Returns what is measured of a layer, in that order: what matters most comes first."""
    always = (MILLISECONDS, MEMORY, BY_HIDDEN, BY_WEIGHT, WITH_ADAMW)
    share = (SHARE,) if name == "gram" else ()
    # last, since a capture that fails may leave the device in a bad state
    return (*always, *share, *((CAPTURED,) if torch.device(device).type == "cuda" else ()))


def head_measures(
    name: str,
    setting: Setting,
    effort: Effort,
    device: str,
    precision: str = BFLOAT16,
    capture: Capture | None = None,
) -> Iterator[Found]:
    """Measures forward and backward of one layer, and the same with a step of AdamW.

    Each number is there as soon as it is measured, so that none is lost to what comes later. What
    fails, for want of memory or since it cannot be captured, is left out, and the others stay.

    name: one of LOSSES. effort: its seconds count the warm-up too, of which long steps have less.
    precision: one of PRECISIONS; that of float32 stays set in this process. capture: makes a graph
    of a call; by default it is done on CUDA alone.
    Raises what the first call raises.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    dtype = torch.bfloat16 if precision == BFLOAT16 else torch.float32
    if precision != BFLOAT16:
        torch.set_float32_matmul_precision(precision)
    head = _Head(name, LOSSES[name](), *trained_batch(setting, device, dtype), effort, device)
    head.both_ways()  # it may compile for as long as all that follows takes
    measures = measures_of(name, device)
    if capture is None:
        capture = captured_on_cuda
    elif CAPTURED not in measures:
        measures = (*measures, CAPTURED)
    parts: dict[str, Callable[[], float]] = {
        MILLISECONDS: lambda: 1e3 * head.seconds,
        MEMORY: head.extra_mebibytes,
        BY_HIDDEN: lambda: head.errors[0],
        BY_WEIGHT: lambda: head.errors[1],
        WITH_ADAMW: head.milliseconds_with_adamw,
        SHARE: lambda: head.share_of_the_product_rate(setting),
        CAPTURED: lambda: head.captured_milliseconds(capture),
    }
    for measure in measures:
        try:
            value: float | str = parts[measure]()
        except Exception as error:  # libraries raise all sorts, and the others are to stay
            value = _reason(error, of_capture=measure == CAPTURED)
        yield Found(measure, value)
        head.forget()  # after that, since PyTorch may not be able to once a capture has failed


@dataclass(frozen=True)
class _Head:
    """A layer with a batch, and what can be measured of it."""

    name: str
    layer: LinearLoss
    hidden: Tensor
    weight: Tensor
    target: Tensor
    effort: Effort
    device: str

    def both_ways(self) -> None:
        self.hidden.grad = self.weight.grad = None
        self.layer(self.hidden, self.weight, self.target).backward()

    def forget(self) -> None:
        """Frees the gradients and what the allocator keeps, which a graph could not use."""
        self.hidden.grad = self.weight.grad = None
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    @functools.cached_property
    def seconds(self) -> float:
        return _median(self.both_ways, self.effort, self.device)

    def extra_mebibytes(self) -> float:
        """The peak of what a call allocates beyond the two gradients."""
        self.forget()
        kept = sum(x.numel() * x.element_size() for x in (self.hidden, self.weight))
        return (extra_bytes(self.both_ways, self.device) - kept) / 2**20

    @functools.cached_property
    def errors(self) -> tuple[float, float]:
        self.both_ways()
        loss = SphericalLoss(LOSS) if self.name in OURS else F.cross_entropy
        return gradient_errors(loss, self.hidden, self.weight, self.target)

    def milliseconds_with_adamw(self) -> float:
        # at this rate a step does all its work, and leaves the weight as later measures need it
        optimizer = torch.optim.AdamW([self.weight], lr=0.0, fused=True)

        def whole() -> None:
            self.both_ways()
            optimizer.step()

        return 1e3 * _median(whole, self.effort, self.device)

    def share_of_the_product_rate(self, setting: Setting) -> float:
        """The FLOPs a second of a call, as a share of those of the Gram product alone."""
        D, d, m = setting.D, setting.d, setting.m
        W = self.weight.detach()
        rate = 2 * D * d**2 / _median(lambda: W.mT @ W, self.effort, self.device)
        return 4 * (D + m) * d * d / self.seconds / rate

    def captured_milliseconds(self, capture: Capture) -> float:
        """The time of a graph of the call, once it has been seen to compute what the call does."""
        self.both_ways()
        wanted = [x.clone() for x in self._gradients()]
        replay = capture(self.both_ways)
        for leaf in (self.hidden, self.weight):
            assert leaf.grad is not None
            leaf.grad.zero_()
        replay()
        for now, before in zip(self._gradients(), wanted, strict=True):
            if not float((now - before).norm()) <= SAME * float(before.norm()):
                raise RuntimeError("the graph computes another gradient than the call")
        del wanted
        return 1e3 * _median(replay, self.effort, self.device)

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """That by hidden, and rows of that by the weight."""
        assert self.hidden.grad is not None and self.weight.grad is not None
        return self.hidden.grad, self.weight.grad[self.target[:64]]


def _reason(error: BaseException, *, of_capture: bool) -> str:
    """The first line of an error; of a capture that of the first one, since its end raises more."""
    while of_capture:
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None:
            break
        error = before
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _median(run: Callable[[], Any], effort: Effort, device: str) -> float:
    times: list[float] = []
    end = time.perf_counter() + effort.seconds
    while len(times) < effort.warm_up + effort.most:
        times.append(seconds_of(run, device))
        if len(times) >= 2 * effort.fewest and time.perf_counter() > end:
            break
    return statistics.median(times[min(effort.warm_up, len(times) // 2) :])
