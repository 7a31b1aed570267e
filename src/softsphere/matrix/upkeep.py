"""Decides when the factors of W = V U + 1 ωᵀ are measured, and mends them.

While a step shrinks some directions of U, the rows that are added to V grow by U⁻¹, and rounding
errors of V with them; `wear` defines the condition κ that measures this. When κ has grown, a new
generation begins (see `generations`): U ← P, orthogonal, and only rows that are written from then
on are written in its coordinates. P comes from the decomposition U = L P with orthonormal rows
(Gram–Schmidt). From one generation to the next, its rows turn to the directions that steps shrink
least, second least and so on. These are then rows of U and can shrink by many powers of ten before
a digit is lost, so the next generation is far off. The only work that grows with D is reading the
generation of each row. The rows of the smallest generation are rewritten; they are no more than
steps have written. All of V is rewritten only where 1 ωᵀ has outgrown W.

With a second block, an optimizer's momentum B, each step shrinks the component e ⊗ · of [W B] by μ
relative to the rest. With U ← ((P, 0), (e₁P, e₂P)) that component consists of rows of U as well.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from softsphere.matrix.arrays import Arrays
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.inverse import products_for
from softsphere.matrix.mending import directions, rebase, reinvert, renew
from softsphere.matrix.precision import float32_may_pay
from softsphere.matrix.step import HARSH
from softsphere.matrix.update import SingularStepError, Update
from softsphere.matrix.wear import (
    CONDITION,
    FLOOR,
    LONGEST,
    RANGE,
    SHIFT,
    gram_drift,
    kappa,
    measures,
    tolerance,
)

__all__ = ["Watch", "too_harsh"]

# The measurements in a row after which the inverse of recorded steps gets fewer factors.
_PATIENCE = 3
_MEANS = ("renewed", "refactorised", "reinverted", "regrammed")


class _Gauge:
    """Predicts when one measure of wear, which grows by a factor a step, reaches its limit."""

    def __init__(self, limit: float) -> None:
        self.asked = self.limit = limit
        self.level = math.log(FLOOR)
        self.rate = 0.0

    def steps_left(self, value: float, steps: int) -> float:
        """Takes the value after that many more steps. An earlier rate counts for half of it."""
        level = math.log(max(value, FLOOR)) if math.isfinite(value) else math.log(self.limit)
        self.rate = max((level - self.level) / steps, self.rate / 2, 1e-9)
        self.level = level
        return (math.log(self.limit) - level) / self.rate

    def settle(self, value: float) -> None:
        """Takes the value after mending, and raises the limit where mending cannot reach it."""
        self.limit = max(self.asked, 2 * value)
        self.level = math.log(max(value, FLOOR))


class Watch:
    """Decides when to measure the factors, and mends them.

    The period is stretched while they wear slowly and cut when they wear fast, so that a limit is
    met about two measurements ahead.
    """

    def __init__(self) -> None:
        self.blocks = Blocks(((1.0,),), (1.0,))
        self.done = dict.fromkeys(_MEANS, 0)
        self.seconds = 0.0
        self.refused: Tensor | None = None
        # see `Update`; of the deviation the largest since the last check
        self.undone: Tensor | None = None
        self.deviation: Tensor | None = None
        # how many factors the inverse of a recorded step has, in float64 and in float32; see `plan`
        self.products = (0, 0)
        self._fewer = 0
        # whether steps are recorded for later, so that nothing is to be read or mended now
        self.recording = False
        self.restart()

    def frame(self, W: Arrays) -> Tensor:
        """Returns the rows (1, 0) and e for the last step, or the identity if there was none."""
        rows = self.blocks.eigenbasis()
        if len(rows) != W.blocks:
            return torch.eye(W.blocks, dtype=torch.float64, device=W.U.device)
        return torch.tensor(rows, dtype=torch.float64, device=W.U.device)

    def basis(self, W: Arrays) -> Tensor:
        """Returns the U with which a generation begins."""
        return torch.kron(self.frame(W), directions(W))

    def restart(self) -> None:
        """Forgets what was seen, so that the next step is followed by a measurement."""
        self.period, self.steps, self.since_gram = 1, 0, 0
        self.checks = 0
        limits = (CONDITION**2 - 1, 1.0, SHIFT, 2.0**RANGE)
        self.gauges = tuple(_Gauge(limit) for limit in limits)

    def note(self, update: Update) -> None:
        """Keeps on the device what is known of a step, in memory that stays the same."""
        self.refused = _kept(self.refused, update.flag)
        self.undone = _kept(self.undone, update.undone)
        if self.deviation is not None and update.deviation is not None:
            self.deviation.clamp_(min=update.deviation)
        else:
            self.deviation = _kept(None, update.deviation)

    def prepare(self, W: Arrays, gradient: GradientFactors, blocks: Blocks) -> None:
        """Before a step that leaves next to nothing of a direction, makes that a row of U.

        With T = X Σ Yᵀ, U = Xᵀ becomes Σ Yᵀ, whose rows are orthogonal too.
        """
        start = time.perf_counter()
        eye = torch.eye(W.width, dtype=torch.float64, device=W.U.device)
        A = gradient.to(torch.float64).A
        X = torch.linalg.svd(blocks.times(eye) + blocks.spread[0] * A).U
        renew(W, torch.kron(self.frame(W), X.mT.contiguous()))
        self.done["renewed"] += 1
        self.seconds += time.perf_counter() - start

    def tell(self) -> None:
        """Raises SingularStepError if a step since the last check was left out."""
        if self.refused is not None and bool(self.refused):
            self.refused.zero_()
            raise SingularStepError(
                "a step since the last check was not finite or was singular, and was left out with "
                "those after it; lower lr, or look for an overflow in the layers below"
            )

    def is_due(self, blocks: Blocks, share: float) -> bool:
        """Counts a step, and says whether to measure: it is time, or the step was harsh."""
        self.blocks = blocks
        self.steps += 1
        if blocks.known:
            # With less momentum than before, what momentum scales shrinks faster than was planned.
            self.period = min(self.period, blocks.horizon(2 * CONDITION))
        return share < HARSH or self.steps >= self.period

    def check(self, W: Arrays) -> None:
        """Measures, mends by the cheapest means that suffices, and sets the next period.

        Raises SingularStepError if a step since the last check was left out on a GPU.
        """
        self.tell()
        start, steps = time.perf_counter(), max(self.steps, 1)
        W.settle()
        self.checks += 1
        if self.deviation is not None:
            deviation, w = float(self.deviation), W.V.width
            may = W.dtype == torch.float32 and float32_may_pay(W.device, w)
            in_float32 = products_for(deviation, w, torch.float32, HARSH) if may else 0
            self._choose_products((products_for(deviation, w), in_float32))
            self.deviation.zero_()
        self._check_gram(W, steps)
        before = measures(W, self.checks)
        left = [gauge.steps_left(x, steps) for gauge, x in zip(self.gauges, before, strict=True)]
        if min(left) <= 0:
            self._mend(W)
            for gauge, x in zip(self.gauges, measures(W, self.checks), strict=True):
                gauge.settle(x)
            left = [(math.log(g.limit) - g.level) / g.rate for g in self.gauges]
        ahead = min(2 * self.period, LONGEST, self.blocks.horizon(2 * CONDITION), min(left) / 2)
        self.period, self.steps = max(int(ahead), 1), 0
        self.seconds += time.perf_counter() - start

    def _choose_products(self, wanted: tuple[int, int]) -> None:
        """Takes these numbers of factors, or fewer than before if it is not for the first times.

        With others a step has to be recorded again, which takes longer than a factor too many.
        """
        both = zip(wanted, self.products, strict=True)
        fewer = all(new == old or 0 < new < old for new, old in both)
        self._fewer = self._fewer + 1 if fewer and wanted != self.products else 0
        if not fewer or self._fewer == _PATIENCE:
            self.products, self._fewer = wanted, 0

    def mend_gram(self, W: Arrays) -> None:
        """Has the Gram matrix computed again if it has drifted."""
        if gram_drift(W, 1, self.checks) > tolerance(W):
            W.forget_gram()
            self.done["regrammed"] += 1

    def _check_gram(self, W: Arrays, steps: int) -> None:
        """Measures the Gram matrix, but seldom.

        The intervals are such that reading W costs O(w²) a step and computing it again O(w³).
        """
        self.since_gram += steps
        if self.since_gram < max(LONGEST, W.all_rows // len(W.U)):
            return
        self.since_gram = 0
        self.mend_gram(W)

    def _mend(self, W: Arrays) -> None:
        """Mends whatever is beyond its limit, by the cheapest means that suffices."""

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


def _kept(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Returns the new value in the memory of the old one, or in memory of its own."""
    if new is None or old is None:
        return old if new is None else new.clone()
    return old.copy_(new)


def too_harsh(W: Arrays, update: Update) -> bool:
    """Whether this single step would raise κ above twice its limit."""
    if W.blocks > 1:
        return False
    after = kappa(update.after(W, "U"), update.after(W, "U_inv"))
    return 2 * CONDITION < after < math.inf
