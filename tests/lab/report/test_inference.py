"""Intervals and tests against values worked out by hand or by another library."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from softsphere_lab.report import inference


def test_the_interval_is_students():
    mean, half = inference.interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=math.sqrt(7 / 9))
    assert mean == pytest.approx(7 / 3)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(inference.interval([1.0])[1])


def test_the_paired_test_by_hand_and_at_its_limits():
    # differences 1, 2, 3: t = 2 / (1 / √3)
    t = 2 * math.sqrt(3)
    assert inference.paired_p([2, 4, 6], [1, 2, 3]) == pytest.approx(2 * stats.t.sf(t, 2))
    assert inference.paired_p([1, 2, 3], [1, 2, 3]) == 1.0
    assert math.isnan(inference.paired_p([1], [2]))
    # two equal differences are no proof, and rounding is not a spread
    assert math.isnan(inference.paired_p([1.9, 2.1], [1.8, 2.0]))
    equal = [1.6 + 0.1, 1.7 + 0.1, 1.8 + 0.1, 1.9 + 0.1]
    assert inference.paired_p(equal, [1.6, 1.7, 1.8, 1.9]) == 2**-3


def test_an_interval_of_what_is_not_finite_is_none():
    mean, half = inference.interval([1.0, math.inf])
    assert mean == math.inf and math.isnan(half)


def test_holm_multiplies_the_smallest_most_and_never_falls():
    assert inference.holm([0.02, 0.03, math.nan, 0.5])[:2] == pytest.approx([0.06, 0.06])
    assert math.isnan(inference.holm([0.02, math.nan])[1])
    assert inference.holm([0.9, 0.8]) == [1.0, 1.0]
