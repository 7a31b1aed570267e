"""Measures the numerical condition of the factors of W = V U + 1 ωᵀ, without changing them.

A rounding error of column i of V is relative to that column and comes back multiplied by row i of
U. What matters is therefore the condition of U with each of its rows scaled at will,

    κ = rms_i ‖U_i·‖ ‖U⁻¹_·i‖,

which is 1 where the rows of U are orthogonal, whatever their lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.matrix.abstract import Kept
from softsphere.matrix.arrays import Arrays

__all__ = [
    "CONDITION",
    "FLOOR",
    "LAST_CONDITION",
    "LONGEST",
    "RANGE",
    "SHIFT",
    "Health",
    "amplification",
    "block_sizes",
    "gram_drift",
    "health",
    "kappa",
    "measures",
    "probes_of",
    "tolerance",
]

# A rounding error may be amplified by this much before a new generation begins.
CONDITION = 4.0
# Where nobody looks at a step before it is taken, none may amplify them by more than this.
LAST_CONDITION = 8 * CONDITION
# ‖1 ωᵀ‖ against ‖W‖. Beyond it, W = V U + 1 ωᵀ is a small difference of large numbers.
SHIFT = 8.0
# Rows of U may be 2^±RANGE long.
RANGE = 40
# The most steps between two measurements.
LONGEST = 64
# Logarithms of a measure begin here.
FLOOR = 1e-14
# How far U U⁻¹ may be from I, and the Gram matrix from its definition, in units of the square
# root of V's precision.
_DRIFT = 0.03


@dataclass(frozen=True)
class Health:
    """The numerical state of the factors of a layer's weight, and what was done to keep it good.

    Args:
        condition: rms over i of ‖U_i·‖ ‖U⁻¹_·i‖, the factor by which a rounding error in V is
            amplified in W.
        inverse_drift: ‖U U⁻¹ − I‖ / √w, with the rows of U scaled to norm 1.
        gram_drift: the largest relative error of the kept xᵀ G x against ‖W_c x‖² over random x,
            where W_c is W less its mean row; NaN if it was not measured.
        shift: ‖1 ωᵀ‖ / ‖W‖.
        generations: the number of generations in which rows of V are written.
        renewed: how often a new generation was begun.
        refactorised: how often all of V was written again.
        reinverted: how often U⁻¹ was computed from U. The leaves of a clustered layer begin a new
            generation instead.
        regrammed: how often G was computed from W.
        seconds: the time spent on all of this.
    """

    condition: float
    inverse_drift: float
    gram_drift: float
    shift: float
    generations: int
    renewed: int
    refactorised: int
    reinverted: int
    regrammed: int
    seconds: float


def health(W: Arrays, probes: int, seconds: float, done: dict[str, int]) -> Health:
    """Measures the factors; `done` counts by name what was mended, in `seconds`."""
    return Health(
        condition=_condition(W),
        inverse_drift=_inverse_drift(W),
        gram_drift=gram_drift(W, probes),
        shift=_shift_share(W),
        generations=sum(count > 0 for count in W.generations.counts()),
        seconds=seconds,
        **done,
    )


def tolerance(W: Kept) -> float:
    """How far U U⁻¹ may be from I, and xᵀGx from ‖W_c x‖²."""
    return _DRIFT * math.sqrt(torch.finfo(W.dtype).eps)


def measures(W: Arrays, seed: int) -> tuple[float, float, float, float]:
    """κ² − 1, the drift of U⁻¹ in tolerances, the share of 1 ωᵀ, and the length of U's rows."""
    reach = float(torch.log2(W.U.norm(dim=1)).abs().max())
    length = 2.0 ** min(reach, 1000.0)
    return _condition(W) ** 2 - 1, _inverse_drift(W, seed) / tolerance(W), _shift_share(W), length


def block_sizes(W: Arrays) -> Tensor:
    """‖W_b‖ of the block of each column (w): errors count relative to the block they are in."""
    return _sizes_of_columns(W, W.gram)


def _sizes_of_columns(W: Arrays, gram: Tensor) -> Tensor:
    squares = gram.diagonal().clamp_min(0).unflatten(0, (W.blocks, -1)).sum(1)
    floor = 1e-6 * squares.max().clamp_min(1e-300)
    return torch.maximum(squares, floor).sqrt().repeat_interleave(W.width)


def _condition(W: Arrays) -> float:
    """κ of the factors; see the head of this module."""
    return kappa(W.U, W.U_inv, block_sizes(W))


def amplification(U: Tensor, U_inv: Tensor, size: Tensor | None) -> Tensor:
    """√w κ of U (), with the columns of W measured in units of `size` (w).

    size: None where all columns have the same unit, which κ does not depend on.
    """
    if size is not None:
        U, U_inv = U / size, U_inv * size.unsqueeze(1)
    size_of_all: Tensor = torch.linalg.vector_norm(U.norm(dim=1) * U_inv.norm(dim=0))
    return size_of_all


def kappa(U: Tensor, U_inv: Tensor, size: Tensor | None = None) -> float:
    """κ of U; see `amplification`."""
    return float(amplification(U, U_inv, size)) / math.sqrt(len(U))


def _shift_share(W: Arrays) -> float:
    """‖1 ωᵀ‖ / ‖W‖ under Π, of the first block."""
    return float((W.omega / block_sizes(W))[: W.width].norm()) * math.sqrt(W.mass)


def probes_of(width: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Random vectors (width, count) in float64, the same on every device.

    A measurement that is repeated takes another seed each time, since one set of vectors may be
    nearly orthogonal to what has drifted.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(width, count, generator=generator, dtype=torch.float64, device="cpu")
    return vectors.to(device)


def _inverse_drift(W: Arrays, seed: int = 0) -> float:
    """‖U U⁻¹ − I‖ / √w with the rows of U scaled to norm 1, estimated by two random vectors."""
    lengths = W.U.norm(dim=1, keepdim=True)
    z = probes_of(len(W.U), 2, seed, W.device)
    back = W.U @ (W.U_inv @ (z * lengths)) / lengths
    return float((back - z).norm() / z.norm())


def gram_drift(W: Arrays, probes: int, seed: int = 0) -> float:
    """The largest relative error of xᵀGx against ‖W_c x‖² under Π, over random x. O(D w probes).

    A difference as small as the rounding of V can make in ‖W_c x‖² does not count.
    """
    if probes < 1:
        return math.nan
    x = probes_of(len(W.U), probes, seed, W.device)
    x = x / _sizes_of_columns(W, W.centred_gram).unsqueeze(1)
    common = W.mean @ x
    squares, rest = torch.zeros_like(common), torch.zeros_like(common)
    for part, outputs in W.times(x):
        shifted = outputs - common
        weighted = shifted if W.pi is None else shifted * W.pi[part].unsqueeze(1)
        squares += (weighted * shifted).sum(0)
        rest += weighted.sum(0)
    squares, rest = W.total(squares), W.total(rest)
    exact = squares - rest.square() / W.mass
    kept = (x * (W.centred_gram @ x)).sum(0)
    unseen = W.mass * (torch.finfo(W.dtype).eps * (W.mean.abs() @ x.abs())).square()
    return float(((kept - exact).abs() / (exact + unseen).clamp_min(1e-300)).max())
