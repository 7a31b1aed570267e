r"""The inverse of a small matrix S = I − K near I, which a step of a factored matrix needs.

By elimination the inverse of any regular S is found; its many short operations wait for each other.
Where ‖K‖ < 1, the product

    S⁻¹ = (I + K) (I + K²) (I + K⁴) … (I + K^(2^k)) · (I − K^(2^(k+1)))⁻¹

takes 2k matrix products, and without its last factor it has a relative error of at most about
‖K^(2^k)‖². Nothing is assumed of K: whether that is small enough is measured, on a CPU after each
factor. On a GPU, where reading a number waits for the device, k is chosen before. All of it is a
function of K, since I − K keeps fewer digits of a small K than K has.

Source: Schulz 1933, Zeitschrift für Angewandte Mathematik und Mechanik 13 (Newton's iteration from
I + K, which this is in exact arithmetic).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from softsphere.matrix.precision import matmul

__all__ = ["Inverse", "by_elimination", "by_few_products", "by_products", "products_for"]

# ‖K^(2^k)‖ that leaves no error.
_SMALL = {torch.float64: 1e-8, torch.float32: 1e-4}
# With ‖K‖ up to this, products take less time than elimination; twice this is still allowed for,
# and this much in any case.
_CALM, _WILD, _LEAST = 0.45, 0.9, 0.01
# The width of S beyond which elimination takes less time, though it waits between its operations.
_WIDEST = 4096


class Inverse(NamedTuple):
    """S⁻¹, and what is known of it.

    value: (n, n) S⁻¹
    share: the smallest pivot of S over the largest, or over 1 if that is more, or a bound below it;
        1 where nothing is known of the pivots
    solved: whether `value` is the inverse; None where elimination says so by its pivots
    deviation: ‖(I − S)²‖, at least the square of the norm of I − S; None where it was not asked for
    """

    value: Tensor
    share: Tensor | float
    solved: Tensor | None = None
    deviation: Tensor | None = None


def by_elimination(K: Tensor, *, measured: bool = False) -> Inverse:
    """(I − K)⁻¹ by LU with pivots. measured: whether the deviation from I is found as well."""
    eye = torch.eye(len(K), dtype=K.dtype, device=K.device)
    LU, pivots, _ = torch.linalg.lu_factor_ex(eye - K)
    value = torch.linalg.lu_solve(LU, pivots, eye)
    deviation = torch.linalg.matrix_norm(K @ K) if measured else None
    share: Tensor | float = 1.0
    if len(K):
        least, most = LU.diagonal().abs().aminmax()
        share = least / most.clamp_min(1)
    return Inverse(value, share, None, deviation)


def by_few_products(K: Tensor, share: float) -> Inverse | None:
    """(I − K)⁻¹ by no more products than its dtype needs; None if K is too large.

    With k = ‖K‖ < 1/3 elimination swaps no rows, and all pivots of S are between 1 − k and
    1/(1 − k). The result is None if the share that follows, (1 − k)², is less than `share`.
    """
    power, size = K, float(torch.linalg.vector_norm(K))
    known = (1 - size) ** 2 if size < 1 / 3 else 0.0
    if known < share:
        return None
    value = _plus_identity(K)
    while size**2 > torch.finfo(K.dtype).eps / 4:
        power = power @ power
        value = torch.addmm(value, value, power)
        size = float(torch.linalg.vector_norm(power))
    return Inverse(value, known)


def by_products(K: Tensor, count: int, share: float = 0.0) -> Inverse:
    """(I − K)⁻¹ by 2 · count matrix products, count ≥ 1.

    It counts as solved only if the pivots of I − K leave more than this share, by its deviation.
    """
    power, value, norms = K, _plus_identity(K), []
    for i in range(count):
        power = matmul(power, power)
        value = value + matmul(value, power)
        if i in (0, count - 1):
            norms.append(torch.linalg.matrix_norm(power))
    solved = norms[-1] < _SMALL[K.dtype]
    if share:
        solved = solved & (norms[0] < _deviation(share))
    return Inverse(value, 1.0, solved, norms[0])


def _deviation(share: float) -> float:
    """The deviation of S from I whose pivots leave this share, (1 − k)² with k² the deviation."""
    return (1 - math.sqrt(share)) ** 2


def _plus_identity(K: Tensor) -> Tensor:
    """I + K, as a new tensor."""
    result = K.clone()
    result.diagonal().add_(1)
    return result


def products_for(
    deviation: float, width: int, dtype: torch.dtype = torch.float64, share: float = 0.0
) -> int:
    """How many factors `by_products` should have after such deviations; 0 where it should not be.

    >>> products_for(0.01, 200), products_for(0.5, 200), products_for(0.01, 8192)
    (4, 0, 0)
    """
    size = math.sqrt(deviation) if deviation >= 0 else math.inf
    calm = min(_CALM, math.sqrt(_deviation(share)) / 2)
    if not size <= calm or width > _WIDEST:
        return 0
    allowed = min(max(2 * size, _LEAST), _WILD)
    return max(1, math.ceil(math.log2(math.log(_SMALL[dtype]) / math.log(allowed))))
