"""What can be said from a handful of seeds: intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

__all__ = ["holm", "interval", "paired_p"]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; nan for a single value.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, float(half)


def paired_p(values: Sequence[float], reference: Sequence[float]) -> float:
    """Two-sided p of Student's paired test; 1 where all differences are zero, nan for one pair.

    >>> paired_p([1.0, 2.0], [1.0, 2.0])
    1.0
    """
    differences = np.subtract(values, reference)
    if len(differences) < 2:
        return math.nan
    if not differences.any():
        return 1.0
    if np.ptp(differences) == 0:
        return 0.0
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
