"""What can be said from a handful of seeds: intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

__all__ = ["FEWEST_PAIRS", "LEVEL", "holm", "interval", "paired_p"]

# Below it a p is taken to show something.
LEVEL = 0.05
# With two pairs Student's test has one degree of freedom: a chance likeness of two differences
# passes for certainty.
FEWEST_PAIRS = 3


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t, nan where there is none to give.

    Of no values both are nan.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, float(half)


def paired_p(values: Sequence[float], reference: Sequence[float]) -> float:
    """Two-sided p of Student's paired test, nan for fewer than FEWEST_PAIRS.

    Where the differences are all equal it is that of the sign test, and 1 if they are zero.

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
    # Errors are counts, so that differences are often the same, and then what spread there is is
    # rounding: nothing to measure chance by.
    if np.ptp(differences) <= 1e-9 * largest:
        return float(2.0 ** (1 - len(differences)))
    return float(stats.ttest_rel(values, reference).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for several comparisons; nan stays nan and is not counted.

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
