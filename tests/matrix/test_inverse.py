"""The inverse of a matrix near I: by elimination, and by products as far as they reach."""

from __future__ import annotations

import pytest
import torch

from softsphere.matrix.inverse import by_elimination, by_products, products_for


def near_identity(size, width=30):
    """I − K with a symmetric K of the norm `size`."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    spectrum = torch.linspace(-size / 2, size, width, dtype=torch.float64)
    return torch.eye(width, dtype=torch.float64) - (basis * spectrum) @ basis.mT


@pytest.mark.parametrize("size", [0.0, 0.01, 0.2, 0.3])
def test_products_for_a_deviation_give_the_inverse(size):
    S = near_identity(size)
    deviation = by_elimination(S, measured=True).deviation
    count = products_for(float(deviation), len(S))
    assert count >= 1
    found = by_products(S, count)
    assert bool(found.solved) and found.share() == 1
    torch.testing.assert_close(found.value @ S, torch.eye(30, dtype=torch.float64))
    torch.testing.assert_close(found.value, by_elimination(S).value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.deviation, deviation)


@pytest.mark.parametrize("size", [0.9, 1.1, torch.inf, torch.nan])
def test_products_that_do_not_reach_the_inverse_say_so(size):
    assert not bool(by_products(near_identity(size), 4).solved)


def test_the_number_of_products_allows_for_twice_the_deviation():
    for size in (0.02, 0.1, 0.3, 0.44):
        S = near_identity(min(2 * size, 0.89))
        assert bool(by_products(S, products_for(size**2, 30)).solved)


def test_where_elimination_is_taken():
    assert products_for(0.46**2, 100) == 0
    assert products_for(float("nan"), 100) == 0 and products_for(float("inf"), 100) == 0
    assert products_for(0.01, 1025) == 0 and products_for(0.01, 1024) > 0
    assert by_elimination(near_identity(0.1)).deviation is None


def test_a_matrix_without_rows():
    none = torch.zeros(0, 0, dtype=torch.float64)
    assert by_elimination(none).share() == 1
