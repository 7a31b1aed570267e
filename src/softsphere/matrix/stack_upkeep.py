"""Measures the factors of a stack of matrices and mends them, as `wear` and `upkeep` do for one.

Each matrix has a period of its own: it is measured after so many steps in which it had factors, and
only then. When its condition has grown too large, U_c ← P with orthonormal rows, its map takes
U_c P⁻¹ up, and the rows that were stepped since the last time are carried over. So an update of
the coordinates costs O(w³), and O(w²) for each row that has been a target, not for each row.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from softsphere.matrix.stack_arrays import StackArrays
from softsphere.matrix.stack_mending import (
    recompute_sums,
    renew_coordinates,
    rewrite_rows,
    stack_directions,
)
from softsphere.matrix.stack_step import Increments, StackUpdate
from softsphere.matrix.stack_wear import measures, square_conditions, stack_gram_drift
from softsphere.matrix.wear import CONDITION, LONGEST, RANGE, SHIFT, tolerance

__all__ = ["StackWatch", "too_harsh_steps"]

# The limits of κ², the drift of U⁻¹, the share of 1 ωᵀ and the length of U's rows. κ is mended at
# half of what it may be, so that a matrix need not be measured again after each of the next steps.
_LIMITS = ((CONDITION / 2) ** 2, 1.0, SHIFT, 2.0**RANGE)
# The most steps of a matrix between two measurements.
_LONGEST = 32


class StackWatch:
    """Decides which matrices to measure after a step, and mends them.

    steps: (C) steps of a matrix since it was measured
    bound: (C) an upper bound on the logarithm of its κ²: the one that was measured, and what the
        steps since may have added to it
    since_gram: (C) steps since its Gram matrix was compared with its rows
    checks: how often some of them were measured
    """

    def __init__(self, W: StackArrays) -> None:
        self.done = dict.fromkeys(("renewed", "refactorised", "reinverted", "regrammed"), 0)
        self.seconds = 0.0
        self.restart(W)

    def restart(self, W: StackArrays) -> None:
        """Forgets what was seen, so that the next step of a matrix is followed by a measurement."""
        ones = torch.ones(W.count, dtype=torch.float64, device=W.device)
        self.steps, self.since_gram, self.bound = ones * 0, ones * 0, ones * 0
        self.checks = 0

    def after_step(self, W: StackArrays, ids: Tensor, share: Tensor) -> None:
        """Counts a step of some matrices, and measures those whose time has come."""
        self.steps[ids] += 1
        self.since_gram[ids] += 1
        self.bound[ids] -= 2 * share.log()
        due = (self.steps[ids] >= _LONGEST) | (self.bound[ids] > 2 * math.log(CONDITION))
        if bool(due.any()):
            self.check(W, ids[due])

    def check(self, W: StackArrays, ids: Tensor) -> None:
        """Measures some matrices and mends those that need it."""
        start = time.perf_counter()
        self.checks += 1
        for some in W.split(ids):
            measured = measures(W, some, self.checks)
            beyond = ~(measured <= torch.tensor(_LIMITS, device=W.device))
            if bool(beyond.any()):
                self._mend(W, some, beyond)
                mended = some[beyond.any(1)]
                measured[beyond.any(1)] = measures(W, mended, self.checks)
            self.bound[some], self.steps[some] = measured[:, 0].log(), 0.0
        self._check_gram(W, ids)
        self.seconds += time.perf_counter() - start

    def _mend(self, W: StackArrays, ids: Tensor, beyond: Tensor) -> None:
        """Mends matrices by what of (condition, inverse, shift, lengths) is beyond its limit."""
        worn = ids[beyond[:, [0, 1, 3]].any(1)]
        if len(worn):
            renew_coordinates(W, worn, stack_directions(W.of("U", worn)))
            self.done["renewed"] += len(worn)
        shifted = ids[beyond[:, 2]]
        if len(shifted):
            rewrite_rows(W, shifted, stack_directions(W.of("U", shifted)))
            self.done["refactorised"] += len(shifted)

    def _check_gram(self, W: StackArrays, ids: Tensor) -> None:
        """Has G computed again where it has drifted.

        The intervals are such that reading the rows of a matrix costs O(w²) a step.
        """
        often = (W.sizes[ids] / W.width).clamp_min(LONGEST)
        ids = ids[self.since_gram[ids] >= often]
        if not len(ids):
            return
        self.since_gram[ids] = 0.0
        drifted = ids[stack_gram_drift(W, ids, seed=self.checks) > tolerance(W)]
        if len(drifted):
            recompute_sums(W, drifted)
            self.done["regrammed"] += len(drifted)

    def prepare(self, W: StackArrays, part: Increments, kappa: float, chosen: Tensor) -> None:
        """Before a step that leaves next to nothing of a direction, makes that a row of U.

        With T = X Σ Yᵀ, U = Xᵀ becomes Σ Yᵀ, whose rows are orthogonal too.
        """
        start = time.perf_counter()
        left = torch.linalg.svd(part.maps(kappa, chosen)).U
        renew_coordinates(W, part.ids[chosen], left.mT)
        self.done["renewed"] += int(chosen.sum())
        self.seconds += time.perf_counter() - start


def too_harsh_steps(W: StackArrays, update: StackUpdate) -> list[tuple[Increments, Tensor]]:
    """Which matrices (k) of each part this single step would wear beyond twice their limit."""
    found = []
    for part in update.parts:
        # Of w directions, r that keep a share s add about r/(w s²) to κ², which is at least 1.
        rank = part.half[1].shape[1]
        chosen = part.share.square() < rank / W.width
        if bool(chosen.any()):
            U, U_inv = (part.after(W, name, update.kappa, chosen) for name in ("U", "U_inv"))
            chosen[chosen.clone()] = square_conditions(U, U_inv) > (2 * CONDITION) ** 2
            if bool(chosen.any()):
                found.append((part, chosen))
    return found
