"""Steps that cannot be taken, and steps that are taken with care."""

from __future__ import annotations

import copy

import pytest
import torch

from _gradients import D, d, dense_gradient, in_dtype, random_gradient
from softsphere.matrix import SingularStepError
from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.gradient import GradientFactors


def test_a_step_that_is_singular_or_not_finite_changes_nothing():
    W = FactoredMatrix(torch.randn(D, d).double())
    before = copy.deepcopy(W.arrays.state())
    h = torch.tensor([[2.0, 0, 0, 0]]).double()
    none = torch.empty(0, dtype=torch.long)
    singular = GradientFactors(h, h, torch.zeros(1).double(), none, none, h.new_empty(0))
    with pytest.raises(SingularStepError, match="singular"):
        W.add_(singular, alpha=-0.25)
    with pytest.raises(SingularStepError, match="not finite"):
        W.add_(random_gradient(2, 3, 0) * float("nan"), alpha=-0.1)
    with pytest.raises(SingularStepError, match="weight decay"):
        W.add_(random_gradient(2, 3, 0), decay=1.0)
    for name, value in W.arrays.state().items():
        assert torch.equal(value, before[name]), name
    W.add_(singular, alpha=-0.2)


@pytest.mark.once("a GPU ends its process for an index out of range")
def test_a_step_at_rows_that_there_are_not_changes_nothing():
    W = FactoredMatrix(torch.randn(D, d).double())
    before = copy.deepcopy(W.arrays.state())
    with pytest.raises(IndexError):
        W.add_(random_gradient(2, 3, 0, rows=5 * D), alpha=-0.1)
    for name, value in W.arrays.state().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.once("on a GPU a step is checked later")
@pytest.mark.parametrize("pi", [None, torch.linspace(0.5, 1.5, D)], ids=["uniform", "prior"])
def test_a_step_after_which_squares_overflow_changes_nothing(pi):
    """Entries of 1e19 are finite in float32, but the next loss needs their squares."""
    matrix = FactoredMatrix(torch.ones(D, d), pi=pi)
    one, none = torch.ones(1, d), torch.empty(0, dtype=torch.long)
    shift = GradientFactors(one, 0 * one, torch.ones(1), none, none, one.new_empty(0))
    matrix.add_(shift, alpha=1e15)
    before = copy.deepcopy(matrix.arrays.state())
    for alpha in (1e19, -1e22, 1e38):
        with pytest.raises(SingularStepError, match=r"squares overflow in torch.float32"):
            matrix.add_(shift, alpha=alpha)
    for name, value in matrix.arrays.state().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(matrix.arrays.to_dense(), torch.full((D, d), 1e15))
    wide = FactoredMatrix(torch.ones(D, d).double(), pi=None if pi is None else pi.double())
    wide.add_(in_dtype(shift, torch.float64), alpha=1e38)
    assert wide.arrays.to_dense().isfinite().all()


def test_harsh_steps_are_mended_at_once():
    """One step takes all but 1e-3 of a direction; float32 keeps its digits."""
    torch.manual_seed(0)
    W = FactoredMatrix(torch.randn(D, d))
    dense = W.arrays.to_dense().double()
    for seed in range(30):
        g = random_gradient(1, 1, seed)
        h = g.H / g.H.norm()
        g = GradientFactors(h, h, g.s, g.rows, g.cols, g.x)
        dense = dense - (1 - 1e-3) * dense_gradient(dense, g)
        W.add_(in_dtype(g, torch.float32), alpha=-(1 - 1e-3))
    W.arrays.check()  # on a GPU the last step is finished when W is next read
    error = (W.arrays.to_dense().double() - dense).abs().max() / dense.abs().max()
    assert error < 1e-4
    assert W.health().renewed > 0


def test_a_pivot_that_rounding_could_have_left_is_singular():
    """‖h‖² of ones is exact in any order, so S = 1 − lr ‖h‖² is 200 eps on every machine."""
    width = 512
    matrix = FactoredMatrix(torch.zeros(3, width).double())
    h, none = torch.ones(1, width).double(), torch.empty(0, dtype=torch.long)
    step = GradientFactors(h, h, h.new_zeros(1), none, none, h.new_empty(0))
    left = 200 * torch.finfo(torch.float64).eps
    with pytest.raises(SingularStepError, match="singular"):
        matrix.add_(step, alpha=-(1 - left) / width)
    matrix.add_(step, alpha=-(1 - 8 * left) / width)
