"""Keeping the factors of W = V U + 1 ωᵀ fit for rounded arithmetic, W itself unchanged.

While a step shrinks some directions of U, the rows that are added to V grow by U⁻¹. A rounding
error of column i of V is relative to that column and comes back multiplied by row i of U, so what
matters is not the condition of U but that of U with each of its rows scaled at will:

    κ = rms_i ‖U_i·‖ ‖U⁻¹_·i‖,    1 where the rows of U are orthogonal, whatever their lengths.

So when κ has grown, V is written in the basis of U's right singular vectors, U ← Qᵀ: the directions
that steps shrink are then rows of U, they can shrink by many powers of ten before anything is lost,
and the next time is far off. A repair that made U the identity would have to be repeated for ever.

With a second block, an optimizer's momentum B, W = V₁U₁₁ + V₂U₂₁ and B = V₁U₁₂ + V₂U₂₂. Momentum is
forgotten: (U₂₁ U₂₂) shrinks by μ a step while what is added to V₂ grows. But B is a small map of W
but for the rows that were targets lately, so V₂ is zero elsewhere and stays so: (U₂₁ U₂₂) can be
chosen anew by rewriting those rows alone, at no cost in D.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softsphere.matrix.update import Blocks, SingularStepError

if TYPE_CHECKING:
    from softsphere.matrix.factored import FactoredMatrix

__all__ = ["Watch", "condition", "gram_drift", "inverse_drift", "rebase", "uninterrupted"]

# A rounding error may be amplified by this much before V is written anew.
CONDITION = 8.0
# How far U U⁻¹ may be from I and Q from WᵀW, in units of the square root of V's precision.
DRIFT = 0.03
# ‖1 ωᵀ‖ against ‖W‖: beyond it, W = V U + 1 ωᵀ is a small difference of large numbers.
SHIFT = 8.0
# Rows of U may be 2^±RANGE long before V's columns are scaled.
RANGE = 40
# Steps between two measurements, at most.
LONGEST = 64
MEANS = ("refactorised", "refolded", "rescaled", "reinverted", "regrammed")


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


class Watch:
    """When to measure the factors, and what to do about them.

    The period is stretched while they wear slowly and cut when they wear fast, so that the limit
    is met about two measurements ahead.
    """

    def __init__(self) -> None:
        self.period = 1
        self.steps = 0
        self.last = 0.0
        self.blocks = Blocks(((1.0,),), (1.0,))
        self.done = dict.fromkeys(
            ("refactorised", "refolded", "rescaled", "reinverted", "regrammed"), 0
        )
        self.seconds = 0.0
        self.refused: Tensor | None = None

    def restart(self) -> None:
        """Measures again after the next step, whatever was seen before."""
        self.period, self.steps, self.last = 1, 0, 0.0

    def after_step(self, W: FactoredMatrix, blocks: Blocks, harsh: bool) -> None:
        """Counts a step, and measures when it is time or the step was harsh."""
        self.blocks = blocks
        self.steps += 1
        if harsh or self.steps >= self.period:
            start = time.perf_counter()
            self.check(W)
            self.seconds += time.perf_counter() - start

    def check(self, W: FactoredMatrix) -> None:
        """Measures, mends by the cheapest means that will do, and sets the next period."""
        if self.refused is not None and bool(self.refused):
            self.refused = None
            raise SingularStepError(
                "a step since the last check was not finite or singular and was left out with "
                "those after it; lower lr, or look for an overflow in the layers below"
            )
        wear = self.mend(W)
        rate = (wear - self.last) / max(self.steps, 1)
        ahead = 2 * self.period
        if rate > 0:
            ahead = min(ahead, int((1 - wear) / rate / 2))
        self.period = min(max(ahead, 1), LONGEST, self.blocks.horizon(2 * CONDITION))
        self.steps, self.last = 0, wear

    def mend(self, W: FactoredMatrix) -> float:
        """Does what is needed. Returns the wear that is left; at 1 something must be done."""
        tolerance = DRIFT * math.sqrt(torch.finfo(W.V.dtype).eps)
        drift, lengths = inverse_drift(W), W.U.norm(dim=1)
        if not drift <= tolerance:
            reinvert(W)
            self.done["reinverted"] += 1
            drift = inverse_drift(W)
        kappa, shift = condition(W), shift_share(W)
        if W.blocks > 1 and not (kappa <= CONDITION and lengths.log2().abs().max() < RANGE):
            refold(W, *self.blocks.eigenbasis()[1])
            self.done["refolded"] += 1
            kappa, lengths = condition(W), W.U.norm(dim=1)
        if not (kappa <= CONDITION and shift <= SHIFT):
            rebase(W, aligned(W))
            self.done["refactorised"] += 1
            if gram_drift(W, 1) > tolerance:
                W.regram_()
                self.done["regrammed"] += 1
            kappa, shift, lengths = condition(W), 0.0, W.U.norm(dim=1)
            drift = inverse_drift(W)
        exponents = torch.log2(lengths)
        reach = float(exponents.abs().max()) / RANGE
        if reach > 1:
            rescale(W, exponents.round())
            self.done["rescaled"] += 1
            reach = 0.0
        return max(
            drift / tolerance, math.log(max(kappa, 1)) / math.log(CONDITION), shift / SHIFT, reach
        )


def block_sizes(W: FactoredMatrix) -> Tensor:
    """‖W_b‖ of the block of each column: errors count relative to the block that they are in."""
    squares = W.gram.diagonal().clamp_min(0).unflatten(0, (W.blocks, -1)).sum(1)
    floor = 1e-6 * squares.max().clamp_min(1e-300)
    return torch.maximum(squares, floor).sqrt().repeat_interleave(W.width)


def condition(W: FactoredMatrix) -> float:
    """κ, see above."""
    size = block_sizes(W)
    out = (W.U / size).norm(dim=1)
    back = (W.U_inv * size.unsqueeze(1)).norm(dim=0)
    return float((out * back).square().mean().sqrt())


def shift_share(W: FactoredMatrix) -> float:
    """‖1 ωᵀ‖ / ‖W‖ under Π, of the first block."""
    return float((W.omega / block_sizes(W))[: W.width].norm()) * math.sqrt(W.mass)


def inverse_drift(W: FactoredMatrix) -> float:
    """‖U U⁻¹ − I‖ / √w with the rows of U scaled to norm 1, by two random vectors."""
    lengths = W.U.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(W.version)
    z = torch.randn(len(W.U), 2, generator=generator, dtype=torch.float64).to(W.U.device)
    back = W.U @ (W.U_inv @ (z * lengths)) / lengths
    return float((back - z).norm() / z.norm())


def gram_drift(W: FactoredMatrix, probes: int) -> float:
    """The largest relative error of xᵀQx against ‖W x‖² under Π, over random x. O(D w probes)."""
    if probes < 1:
        return math.nan
    x = torch.randn(len(W.U), probes, generator=torch.Generator().manual_seed(0)).to(W.V)
    x = x / block_sizes(W).to(x).unsqueeze(1)
    exact = torch.zeros(probes, dtype=torch.float64, device=x.device)
    for part, rows in W.chunks():
        squares = (rows @ x).double().square()
        exact += (squares if W.pi is None else squares * W.pi[part].unsqueeze(1)).sum(0)
    kept = (x.double() * (W.gram @ x.double())).sum(0)
    return float(((kept - exact).abs() / exact.clamp_min(1e-300)).max())


def reinvert(W: FactoredMatrix) -> None:
    """U⁻¹ from U. O(w³)."""
    U_inv = inverse(W.U)
    with uninterrupted():
        W.U_inv.copy_(U_inv)
        W.changed()


def rescale(W: FactoredMatrix, exponents: Tensor) -> None:
    """Rows of U ← 2^−e of them, columns of V ← 2^e: exact. O(D w)."""
    scale = torch.exp2(exponents)
    with uninterrupted():
        W.V.mul_(scale.to(W.V.dtype))
        W.U.div_(scale.unsqueeze(1))
        W.U_inv.mul_(scale)
        W.changed()


def aligned(W: FactoredMatrix) -> Tensor:
    """The directions (as rows) in which steps have shrunk U most and least."""
    directions: Tensor = torch.linalg.svd(W.U[: W.width, : W.width], full_matrices=False).Vh
    return directions.contiguous()


def rebase(W: FactoredMatrix, directions: Tensor) -> None:
    """V₁ ← W P⁻¹ with P = directions, so that U₁₁ = P and ω₁ = 0; in place, in row chunks. O(D d²).

    V₂ stays: V₁ ← (V₁ + 1 ω₁ᵀU₁₁⁻¹) U₁₁ P⁻¹ and (U₁₁ U₁₂) ← P U₁₁⁻¹ (U₁₁ U₁₂).
    """
    d = W.width
    first = W.U[:d, :d]
    onto = torch.linalg.inv(directions)
    across, shift = (first @ onto).to(W.V.dtype), (W.omega[:d] @ onto).to(W.V.dtype)
    U, omega = W.U.clone(), W.omega.clone()
    U[:d, :d] = directions
    if W.blocks > 1:
        ahead = torch.linalg.solve(first, W.U[:d, d:])
        U[:d, d:] = directions @ ahead
        omega[d:] -= W.omega[:d] @ ahead
    omega[:d] = 0
    U_inv = inverse(U)
    size = W.chunk_size()
    buffer = W.V.new_empty(min(size, W.num_rows), d)
    with uninterrupted():
        for rows in W.V[:, :d].split(size):
            rows.copy_(torch.addmm(shift, rows, across, out=buffer[: len(rows)]))
        for name, value in (("U", U), ("U_inv", U_inv), ("omega", omega)):
            getattr(W, name).copy_(value)
        W.changed()


def refold(W: FactoredMatrix, past: float, present: float) -> None:
    """(U₂₁ U₂₂) ← (past·P present·P), P = U₁₁ with unit rows, for the rows where V₂ ≠ 0. O(n w²).

    Rows whose share of B has been forgotten to the last digit go back to V₂ = 0.
    """
    d = W.width
    index = torch.cat(W.active).unique() if W.active else W.V.new_empty(0, dtype=torch.long)
    U = W.U.clone()
    unit = U[:d, :d] / U[:d, :d].norm(dim=1, keepdim=True)
    U[d:] = torch.cat([past * unit, present * unit], 1)
    U_inv = inverse(U)
    rows = (W.V[index].double() @ (W.U @ U_inv)).to(W.V.dtype)
    momentum = (W.gram.diagonal()[d:].clamp_min(0).sum() / W.mass).sqrt()
    forgotten = torch.finfo(W.V.dtype).eps / 64 * momentum
    alive = rows[:, d:].norm(dim=1) * abs(present) > forgotten
    rows[:, d:].masked_fill_(~alive.unsqueeze(1), 0)
    with uninterrupted():
        W.V.index_copy_(0, index, rows)
        W.U.copy_(U)
        W.U_inv.copy_(U_inv)
        W.active = [index[alive]]
        W.changed()


def inverse(U: Tensor) -> Tensor:
    """U⁻¹ with the rows of U scaled to norm 1 first, which costs no digits."""
    lengths = U.norm(dim=1)
    scaled: Tensor = torch.linalg.inv(U / lengths.unsqueeze(1))
    scaled /= lengths
    return scaled
