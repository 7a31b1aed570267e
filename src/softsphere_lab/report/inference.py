"""Intervals and paired tests over a few seeds.

SciPy is imported where it is needed: a command that draws no conclusion starts faster without it,
and `scipy.stats` alone takes as long to import as PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_PAIRS", "LEVEL", "holm", "interval", "paired_p"]

# A smaller p is said to show a difference.
LEVEL = 0.05
# With two pairs Student's test has one degree of freedom, so that two differences that happen to be
# alike look like certainty.
FEWEST_PAIRS = 3


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half of its 95 % interval by Student's t.

    Half of the interval is NaN for fewer than two values or a mean that is not finite. Both are NaN
    without values.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    from scipy import special

    return mean, float(special.stdtrit(len(values) - 1, 0.975)) * _standard_error(values)


def paired_p(values: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the two-sided p of Student's paired test, or NaN for fewer than FEWEST_PAIRS pairs.

    If all differences are equal, it is the p of the sign test, and 1 if they are zero.

    >>> round(paired_p([2.0, 3.0, 5.0], [1.0, 2.0, 3.0]), 4)
    0.0572
    >>> paired_p([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    0.25
    >>> paired_p([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    1.0
    """
    differences = np.subtract(values, reference)
    if len(differences) < FEWEST_PAIRS:
        return math.nan
    largest = np.abs(differences).max()
    if largest == 0:
        return 1.0
    # Errors are counts, so that differences are often equal. Their spread is then rounding, by
    # which chance cannot be measured.
    if np.ptp(differences) <= 1e-9 * largest:
        return float(2.0 ** (1 - len(differences)))
    from scipy import special

    t = abs(differences.mean()) / _standard_error(differences)
    return 2 * float(special.stdtr(len(differences) - 1, -t))


def _standard_error(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Of the mean of the values."""
    return float(np.std(values, ddof=1)) / math.sqrt(np.size(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values after Holm's step-down correction for several comparisons.

    NaN stays NaN and is not counted.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [math.nan] * len(p_values)
    known = sorted(
        (i for i, p in enumerate(p_values) if not math.isnan(p)), key=p_values.__getitem__
    )
    floor = 0.0
    for rank, i in enumerate(known):
        floor = max(floor, min(1.0, (len(known) - rank) * p_values[i]))
        corrected[i] = floor
    return corrected
