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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*SPHERICAL, "softmax"])
def test_masked_entries_of_weight_and_bias_may_hold_anything(name, engine):
    if name == "softmax" and engine not in ("auto", "dense"):
        pytest.skip("it needs the logits")
    generator = torch.Generator().manual_seed(0)
    given = [
        torch.randn(*x, dtype=torch.float64, generator=generator) for x in ((5, 3), (C, 3), (C,))
    ]
    found = []
    for nothing in (0.0, torch.nan, torch.inf, -torch.inf):
        H, W, b = (x.clone().requires_grad_() for x in given)
        with torch.no_grad():
            W[0], b[0], b[4] = nothing, nothing, -torch.inf if nothing else 0.0
        options = {"linear_bias": b, "mask": MASK, "options": ENGINES[engine]}
        loss = linear_spherical_loss(H, W, TARGET, SPHERICAL.get(name, name), **options)
        found.append((loss.detach(), *torch.autograd.grad(loss, (H, W, b))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    assert not found[0][3][~MASK].any() and not found[0][2][~MASK].any()


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("number", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SPHERICAL)
def test_a_bias_that_forbids_a_class_is_told_without_a_mask(name, engine, number):
    head = softsphere.LinearSphericalLoss(3, C, SPHERICAL[name], options=ENGINES[engine])
    with torch.no_grad():
        head.bias[4] = number
    with pytest.raises(ValueError, match=r"^bias must be finite for this loss, got .*mask=…"):
        head(torch.randn(5, 3), TARGET)
    with pytest.raises(ValueError, match=r"^linear_bias must be finite"):
        linear_spherical_loss(
            torch.randn(5, 3),
            head.weight,
            TARGET,
            SPHERICAL[name],
            linear_bias=head.bias,
            options=ENGINES[engine],
        )


def test_a_mask_of_a_layer_has_one_entry_per_class():
    head = softsphere.LinearSphericalLoss(3, C)
    with pytest.raises(ValueError, match=r"mask must have shape \(7,\).*all rows, got \(2,\)$"):
        head(torch.zeros(5, 3), TARGET, mask=MASK[:2])
    with pytest.raises(ValueError, match="a mask for each row needs the logits"):
        head(torch.zeros(5, 3), TARGET, mask=MASK.expand(5, C))
