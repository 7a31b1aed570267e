"""Sums of the factors of gradients."""

from __future__ import annotations

import pytest

from _gradients import random_gradient


def test_gradients_of_different_width_do_not_add_up():
    with pytest.raises(ValueError, match="same width, got 4 and 3"):
        random_gradient(2, 2, 0) + random_gradient(2, 2, 0, width=3)
