"""The error of a gradient is seen wherever it is."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from softsphere import SphericalLoss
from softsphere_lab.timing import exact_gradients
from softsphere_lab.timing.exact_gradients import SAMPLED, gradient_errors


@pytest.fixture(params=[F.cross_entropy, SphericalLoss("taylor_softmax")], ids=["softmax", "ours"])
def loss(request):
    return request.param


@pytest.fixture
def batch(loss, monkeypatch):
    """A batch with the gradients that PyTorch computes in float64, looked at in several chunks."""
    monkeypatch.setattr(exact_gradients, "ENTRIES", 1)
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (150, 300)
    )
    target = torch.randint(100, (150,))
    loss(hidden @ weight.mT, target).backward()
    return hidden, weight, target


def test_exact_gradients_have_no_error(batch, loss):
    assert max(gradient_errors(loss, *batch)) < 1e-13


def test_rows_of_either_kind_show_their_error(batch, loss):
    """Rows that are no targets have small gradients, which the others must not hide."""
    hidden, weight, target = batch
    is_target = torch.isin(torch.arange(300), target)
    for rows in (is_target, ~is_target):
        kept = weight.grad.clone()
        weight.grad[rows] *= 1.25
        by_hidden, by_weight = gradient_errors(loss, *batch)
        assert by_hidden < 1e-13 and by_weight == pytest.approx(0.25)
        weight.grad[rows] = math.nan
        assert math.isnan(gradient_errors(loss, *batch)[1])
        weight.grad = kept
    hidden.grad[:SAMPLED] *= 0.5
    assert gradient_errors(loss, *batch)[0] == pytest.approx(0.5)


def test_a_batch_whose_targets_are_all_classes_has_errors_as_well():
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 3))
    target = torch.arange(6) % 3
    F.cross_entropy(hidden @ weight.mT, target).backward()
    by_hidden, by_weight = gradient_errors(F.cross_entropy, hidden, weight, target)
    assert by_hidden < 1e-13 and by_weight < 1e-13
