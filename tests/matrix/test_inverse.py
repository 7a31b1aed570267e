"""The inverse of a matrix near I: by elimination, and by products as far as they reach."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from softsphere.matrix.inverse import (
    by_elimination,
    by_few_products,
    by_products,
    products_for,
)


def symmetric(size, width=30):
    """A symmetric K of the norm `size`, which I − K is inverted for."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    spectrum = torch.linspace(-size / 2, size, width, dtype=torch.float64)
    return (basis * spectrum) @ basis.mT


def identity_less(K):
    return torch.eye(len(K), dtype=K.dtype) - K


@pytest.mark.parametrize("size", [0.0, 0.01, 0.2, 0.3])
def test_products_for_a_deviation_give_the_inverse(size):
    K = symmetric(size)
    deviation = by_elimination(K, measured=True).deviation
    count = products_for(float(deviation), len(K))
    assert count >= 1
    found = by_products(K, count)
    assert bool(found.solved) and found.share == 1
    torch.testing.assert_close(found.value @ identity_less(K), torch.eye(30, dtype=torch.float64))
    torch.testing.assert_close(found.value, by_elimination(K).value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.deviation, deviation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-5, 1e-3, 0.02, 0.1])
def test_few_products_are_as_accurate_as_elimination(size, dtype):
    """The sizes are Frobenius norms, so that the last one is near the largest that is taken."""
    K = symmetric(1.0)
    K = (size * K / K.norm()).to(dtype)
    found, eliminated = by_few_products(K, 0.8), by_elimination(K)

    def residual(value):
        return identity_less(value.double() @ identity_less(K.double())).norm()

    # the diagonal, near 1, is rounded once
    rounding = torch.finfo(dtype).eps / 2 * 30**0.5
    assert residual(found.value) <= 2 * residual(eliminated.value) + rounding
    assert 0.8 <= found.share <= eliminated.share * (1 + 8 * torch.finfo(dtype).eps)


def test_the_share_of_few_products_is_below_that_of_any_elimination():
    """Also where I − S is no symmetric matrix, and elimination swaps rows where it can."""
    torch.manual_seed(0)
    for size in (0.01, 0.05, 0.1):
        for _ in range(20):
            K = torch.randn(12, 12, dtype=torch.float64)
            K *= size / K.norm()
            assert by_few_products(K, 0.8).share <= by_elimination(K).share


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.float64, 8)])
def test_how_many_products_there_are(dtype, most):
    K = 0.1 * torch.ones(30, 30, dtype=dtype) / 30
    with FlopCounterMode(display=False) as counter:
        assert by_few_products(K, 0.8) is not None
    assert counter.get_total_flops() == most * 2 * 30**3


@pytest.mark.parametrize("size", [0.11, 0.5, 5.0, torch.inf, torch.nan])
def test_few_products_leave_to_elimination_what_is_far_from_one(size):
    K = torch.ones(30, 30, dtype=torch.float64) / 30
    assert by_few_products(size * K, 0.8) is None


@pytest.mark.parametrize("size", [0.9, 1.1, torch.inf, torch.nan])
def test_products_that_do_not_reach_the_inverse_say_so(size):
    assert not bool(by_products(symmetric(size), 4).solved)


@pytest.mark.parametrize(
    ("size", "solved"), [(0.05, True), (0.1, True), (0.12, False), (0.3, False)]
)
def test_products_say_whether_they_leave_a_share(size, solved):
    """√0.8 is 1 − 0.106, so that a pivot of I − K may be that far from 1."""
    K = size * torch.ones(30, 30) / 30
    assert by_products(K, 3).solved
    assert bool(by_products(K, 3, 0.8).solved) == solved
    most = products_for(size**2, 30, torch.float32, 0.8)
    assert (most > 0) == (size <= 0.05)


@pytest.mark.parametrize("invert", [by_elimination, lambda K: by_products(K, 3)])
def test_a_gradient_without_factors_has_an_empty_inverse(invert):
    found = invert(torch.empty(0, 0))
    assert found.value.shape == (0, 0) and float(found.share) == 1


def test_the_number_of_products_allows_for_twice_the_deviation():
    for size in (0.02, 0.1, 0.3, 0.44):
        K = symmetric(min(2 * size, 0.89))
        assert bool(by_products(K, products_for(size**2, 30)).solved)


def test_where_elimination_is_taken():
    assert products_for(0.46**2, 100) == 0
    assert products_for(float("nan"), 100) == 0 and products_for(float("inf"), 100) == 0
    assert products_for(0.01, 4097) == 0 and products_for(0.01, 4096) > 0
    assert by_elimination(symmetric(0.1)).deviation is None


def test_a_matrix_without_rows():
    none = torch.zeros(0, 0, dtype=torch.float64)
    assert by_elimination(none).share == 1
    assert by_few_products(none, 0.8).value.shape == (0, 0)
