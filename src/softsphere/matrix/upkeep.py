"""Keeping the factors of W = V U + 1 ωᵀ fit for rounded arithmetic, W itself unchanged.

While a step shrinks some directions of U, the rows that are added to V grow by U⁻¹. A rounding
error of column i of V is relative to that column and comes back multiplied by row i of U, so what
matters is not the condition of U but that of U with each of its rows scaled at will:

    κ = rms_i ‖U_i·‖ ‖U⁻¹_·i‖,    1 where the rows of U are orthogonal, whatever their lengths.

So when κ has grown, a new generation begins (see generations.py): U ← P, orthogonal, and only rows
that are written from then on are written in its coordinates. P are the directions that U = L P has
by Gram and Schmidt: taken again and again they turn to those that steps shrink least, next to least
and so on. These are then rows of U, shrink by many powers of ten before anything is lost, and the
next generation is far off. All that this costs in D is a glance at which generation each row is of,
and the rows of the smallest generation, no more than steps have written. Only where 1 ωᵀ has
outgrown W is all of V written anew.

With a second block, an optimizer's momentum B, what momentum only scales, e ⊗ · in [W B], shrinks
by μ a step beside the rest: U ← ((P, 0), (e₁P, e₂P)), so that it is rows of U as well.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.precision import product
from softsphere.matrix.step import HARSH, SingularStepError, Update

__all__ = [
    "Watch",
    "condition",
    "gram_drift",
    "inverse_drift",
    "rebase",
    "renew",
    "uninterrupted",
]

# A rounding error may be amplified by this much before a new generation begins.
CONDITION = 4.0
# How far U U⁻¹ may be from I and Q from WᵀW, in units of the square root of V's precision.
DRIFT = 0.03
# Less than this is as good as nothing.
FLOOR = 1e-14
# ‖1 ωᵀ‖ against ‖W‖: beyond it, W = V U + 1 ωᵀ is a small difference of large numbers.
SHIFT = 8.0
# Rows of U may be 2^±RANGE long.
RANGE = 40
# Steps between two measurements, at most.
LONGEST = 64
MEANS = ("renewed", "refactorised", "reinverted", "regrammed")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds a Ctrl-C back until the end: the factors are never left half written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    old = signal.getsignal(signal.SIGINT)
    if old is None:  # a handler that Python did not set
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
        if held and callable(old):
            old(*held[-1])
        elif held and old == signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)


class Gauge:
    """One measure of wear, which grows by a factor a step, and when it will reach its limit."""

    def __init__(self, limit: float) -> None:
        self.asked = self.limit = limit
        self.level = math.log(FLOOR)
        self.rate = 0.0

    def steps_left(self, value: float, steps: int) -> float:
        """For the value after so many steps more; a rate is forgotten by halves."""
        level = math.log(max(value, FLOOR)) if math.isfinite(value) else math.log(self.limit)
        self.rate = max((level - self.level) / steps, self.rate / 2, 1e-9)
        self.level = level
        return (math.log(self.limit) - level) / self.rate

    def settle(self, value: float) -> None:
        """The value that mending has left; what it cannot reach is not asked for."""
        self.limit = max(self.asked, 2 * value)
        self.level = math.log(max(value, FLOOR))


class Watch:
    """When to measure the factors, and what to do about them.

    The period is stretched while they wear slowly and cut when they wear fast, so that a limit is
    met about two measurements ahead.
    """

    def __init__(self) -> None:
        self.blocks = Blocks(((1.0,),), (1.0,))
        self.done = dict.fromkeys(MEANS, 0)
        self.seconds = 0.0
        self.refused: Tensor | None
        self.restart()

    def frame(self, W: Arrays) -> Tensor:
        """((1, 0), e) of the last step, or the identity where none was seen."""
        rows = self.blocks.eigenbasis()
        if len(rows) != W.blocks:
            return torch.eye(W.blocks, dtype=torch.float64, device=W.U.device)
        return torch.tensor(rows, dtype=torch.float64, device=W.U.device)

    def basis(self, W: Arrays) -> Tensor:
        """What U is to be when a generation begins."""
        return torch.kron(self.frame(W), directions(W))

    def restart(self) -> None:
        """Measures again after the next step, whatever was seen before."""
        self.period, self.steps, self.since_gram = 1, 0, 0
        self.checks, self.refused = 0, None
        self.gauges = Gauge(CONDITION**2 - 1), Gauge(1.0), Gauge(SHIFT), Gauge(2.0**RANGE)

    def prepare(self, W: Arrays, gradient: GradientFactors, blocks: Blocks) -> None:
        """Before a step that leaves next to nothing of a direction: makes that a row of U.

        With T = X Σ Yᵀ, U = Xᵀ becomes Σ Yᵀ, whose rows are orthogonal as they were.
        """
        start = time.perf_counter()
        eye = torch.eye(W.width, dtype=torch.float64, device=W.U.device)
        A = gradient.to(torch.float64).A
        X = torch.linalg.svd(blocks.times(eye) + blocks.spread[0] * A).U
        renew(W, torch.kron(self.frame(W), X.mT.contiguous()))
        self.done["renewed"] += 1
        self.seconds += time.perf_counter() - start

    def after_step(self, W: Arrays, blocks: Blocks, share: float) -> None:
        """Counts a step, and measures when it is time or the step was harsh."""
        self.blocks = blocks
        self.steps += 1
        # less momentum than before is forgotten faster than was planned for
        self.period = min(self.period, blocks.horizon(2 * CONDITION))
        if share < HARSH or self.steps >= self.period:
            start = time.perf_counter()
            self.check(W)
            self.seconds += time.perf_counter() - start

    def check(self, W: Arrays) -> None:
        """Measures, mends by the cheapest means that will do, and sets the next period."""
        if self.refused is not None and bool(self.refused):
            self.refused = None
            raise SingularStepError(
                "a step since the last check was not finite or singular and was left out with "
                "those after it; lower lr, or look for an overflow in the layers below"
            )
        steps = max(self.steps, 1)
        self.checks += 1
        self.check_gram(W, steps)
        before = measures(W, self.checks)
        left = [gauge.steps_left(x, steps) for gauge, x in zip(self.gauges, before, strict=True)]
        if min(left) <= 0:
            self.mend(W)
            for gauge, x in zip(self.gauges, measures(W, self.checks), strict=True):
                gauge.settle(x)
            left = [(math.log(g.limit) - g.level) / g.rate for g in self.gauges]
        ahead = min(2 * self.period, LONGEST, self.blocks.horizon(2 * CONDITION), min(left) / 2)
        self.period, self.steps = max(int(ahead), 1), 0

    def check_gram(self, W: Arrays, steps: int) -> None:
        """Q against WᵀW so seldom that reading W costs O(w²) a step, and rebuilding Q O(w³)."""
        self.since_gram += steps
        if self.since_gram < max(LONGEST, W.num_rows // len(W.U)):
            return
        self.since_gram = 0
        self.mend_gram(W)

    def mend_gram(self, W: Arrays) -> None:
        """Q anew if it has drifted."""
        if gram_drift(W, 1) > tolerance(W):
            W.forget_gram()
            self.done["regrammed"] += 1

    def mend(self, W: Arrays) -> None:
        """Whatever is beyond its limit, by the cheapest means that will do."""

        def within(*which: int) -> bool:
            now = measures(W, self.checks)
            return all(now[i] <= self.gauges[i].limit for i in which)

        if not within(1):
            reinvert(W)
            self.done["reinverted"] += 1
        if not within(0, 3):
            renew(W, self.basis(W))
            self.done["renewed"] += 1
        if not within(2):
            rebase(W, self.basis(W))
            self.done["refactorised"] += 1


def tolerance(W: Arrays) -> float:
    """How far U U⁻¹ may be from I and Q from WᵀW."""
    return DRIFT * math.sqrt(torch.finfo(W.dtype).eps)


def measures(W: Arrays, seed: int) -> tuple[float, float, float, float]:
    """κ² − 1, the drift of U⁻¹ in tolerances, the share of 1 ωᵀ, and the length of U's rows."""
    reach = float(torch.log2(W.U.norm(dim=1)).abs().max())
    length = 2.0 ** min(reach, 1000.0)
    return condition(W) ** 2 - 1, inverse_drift(W, seed) / tolerance(W), shift_share(W), length


def block_sizes(W: Arrays) -> Tensor:
    """‖W_b‖ of the block of each column: errors count relative to the block that they are in."""
    return spread_over_columns(W, W.gram)


def spread_over_columns(W: Arrays, gram: Tensor) -> Tensor:
    squares = gram.diagonal().clamp_min(0).unflatten(0, (W.blocks, -1)).sum(1)
    floor = 1e-6 * squares.max().clamp_min(1e-300)
    return torch.maximum(squares, floor).sqrt().repeat_interleave(W.width)


def condition(W: Arrays) -> float:
    """κ, see above."""
    return kappa(W.U, W.U_inv, block_sizes(W))


def kappa(U: Tensor, U_inv: Tensor, size: Tensor) -> float:
    out = (U / size).norm(dim=1)
    back = (U_inv * size.unsqueeze(1)).norm(dim=0)
    return float((out * back).square().mean().sqrt())


def too_harsh(W: Arrays, update: Update) -> bool:
    """Whether a step would leave so little of a direction that κ doubled its limit at once."""
    if update.share >= HARSH or W.blocks > 1:
        return False
    U, U_inv = update.after(W, "U"), update.after(W, "U_inv")
    return kappa(U, U_inv, block_sizes(W)) > 2 * CONDITION


def shift_share(W: Arrays) -> float:
    """‖1 ωᵀ‖ / ‖W‖ under Π, of the first block."""
    return float((W.omega / block_sizes(W))[: W.width].norm()) * math.sqrt(W.mass)


def inverse_drift(W: Arrays, seed: int = 0) -> float:
    """‖U U⁻¹ − I‖ / √w with the rows of U scaled to norm 1, by two random vectors."""
    lengths = W.U.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(W.U), 2, generator=generator, dtype=torch.float64).to(W.device)
    back = W.U @ (W.U_inv @ (z * lengths)) / lengths
    return float((back - z).norm() / z.norm())


def gram_drift(W: Arrays, probes: int) -> float:
    """The largest relative error of xᵀGx against ‖W_c x‖² under Π, over random x. O(D w probes).

    W_c is W less its mean row. What the rounding of V can make of ‖W_c x‖² is no error.
    """
    if probes < 1:
        return math.nan
    x = torch.randn(len(W.U), probes, generator=torch.Generator().manual_seed(0))
    x = x.to(W.device, torch.float64) / spread_over_columns(W, W.centred_gram).unsqueeze(1)
    common = W.mean @ x
    squares, rest = torch.zeros_like(common), torch.zeros_like(common)
    for part, outputs in W.times(x):
        shifted = outputs - common
        weighted = shifted if W.pi is None else shifted * W.pi[part].unsqueeze(1)
        squares += (weighted * shifted).sum(0)
        rest += weighted.sum(0)
    exact = squares - rest.square() / W.mass
    kept = (x * (W.centred_gram @ x)).sum(0)
    unseen = W.mass * (torch.finfo(W.dtype).eps * (W.mean.abs() @ x.abs())).square()
    return float(((kept - exact).abs() / (exact + unseen).clamp_min(1e-300)).max())


def reinvert(W: Arrays) -> None:
    """U⁻¹ from U. O(w³)."""
    U_inv = inverse(W.U)
    with uninterrupted():
        W.begin_change()
        W.U_inv.copy_(U_inv)
        W.changed()


def directions(W: Arrays) -> Tensor:
    """The rows of U₁₁ made orthonormal one after the other: P of U₁₁ = L P."""
    first = W.U[: W.width, : W.width]
    lengths = first.norm(dim=1)
    order = lengths.argsort(descending=True)
    P = torch.empty_like(first)
    P[order] = torch.linalg.qr((first / lengths.unsqueeze(1))[order].mT).Q.mT
    return P


def renew(W: Arrays, U: Tensor) -> None:
    """Begins a generation with that U. O(w³), and O(w²) for each row carried over."""
    U_inv = inverse(U)
    step = W.U @ U_inv
    with uninterrupted():
        W.begin_change()
        W.generations.begin(step)
        W.U.copy_(U)
        W.U_inv.copy_(U_inv)
        W.changed()
        W.generations.bound(W.V)


def rebase(W: Arrays, U: Tensor) -> None:
    """Writes all of V for that U and ω = 0; in place, in row chunks. O(D w²)."""
    U_inv = inverse(U)
    step, shift = W.U @ U_inv, (W.omega @ U_inv).to(W.dtype)
    with uninterrupted():
        W.begin_change()
        for part in W.V.chunks():
            W.V[part] = product(W.coordinates(part), step).add_(shift)
        W.generations.forget(len(U))
        W.U.copy_(U)
        W.U_inv.copy_(U_inv)
        W.omega.zero_()
        W.changed()


def inverse(U: Tensor) -> Tensor:
    """U⁻¹ with the rows of U scaled to norm 1 first, which costs no digits."""
    lengths = U.norm(dim=1)
    scaled: Tensor = torch.linalg.inv(U / lengths.unsqueeze(1))
    scaled /= lengths
    return scaled
