"""Masked classes of a linear layer: it is the layer of the classes that take part, alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import softsphere
from _engines import ENGINES, SPHERICAL
from softsphere.functional import linear_spherical_loss, spherical_loss

C = 7
TARGET = torch.tensor([1, 2, 6, 3, 2])
MASK = torch.tensor([False, True, True, True, False, True, True])
PRIORS = {"uniform": None, "prior": torch.arange(1.0, 8.0, dtype=torch.float64)}
both_priors = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())


@both_priors
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SPHERICAL)
def test_a_linear_layer_leaves_classes_out(name, engine, prior):
    generator = torch.Generator().manual_seed(0)
    H, W, b = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((5, 3), (C, 3), (C,))
    )
    leaves = [x.clone().requires_grad_() for x in (H, W, b)]
    got = linear_spherical_loss(
        leaves[0],
        leaves[1],
        TARGET,
        SPHERICAL[name],
        linear_bias=leaves[2],
        mask=MASK,
        prior=prior,
        options=ENGINES[engine],
    )
    few = [H.clone().requires_grad_(), W[MASK].requires_grad_(), b[MASK].requires_grad_()]
    logits = nn.functional.linear(*few)
    place = (MASK.cumsum(0) - 1)[TARGET]
    want = spherical_loss(
        logits, place, SPHERICAL[name], prior=None if prior is None else prior[MASK]
    )
    torch.testing.assert_close(got, want)
    slopes, wanted = torch.autograd.grad(got, leaves), torch.autograd.grad(want, few)
    torch.testing.assert_close(slopes[0], wanted[0])
    for slope, x in zip(slopes[1:], wanted[1:], strict=True):
        torch.testing.assert_close(slope[MASK], x)
        assert not slope[~MASK].any()


@pytest.mark.parametrize("name", ["softmax", "taylor_softmax"])
def test_a_linear_layer_that_makes_logits_leaves_classes_out(name):
    head = softsphere.LinearSphericalLoss(3, C, name, label_smoothing=0.1)
    hidden = torch.randn(5, 3)
    got = head(hidden, TARGET, mask=MASK)
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    want = spherical_loss(logits, TARGET, name, label_smoothing=0.1, mask=MASK)
    torch.testing.assert_close(got, want)


def test_accumulation_takes_no_mask():
    head = softsphere.LinearSphericalLoss(4, C)
    with (
        pytest.raises(ValueError, match="mask cannot be used inside accumulate"),
        head.accumulate(),
    ):
        head(torch.zeros(5, 4), TARGET, mask=MASK)
