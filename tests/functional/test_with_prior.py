"""A prior that is assigned to a criterion or to a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from softsphere import LinearSphericalLoss, TaylorSoftmaxLoss

COUNTS = torch.tensor([1.0, 3.0, 6.0])
MAKERS = {
    "criterion": lambda prior: TaylorSoftmaxLoss(prior=prior),
    "layer": lambda prior: LinearSphericalLoss(5, 3, prior=prior),
}
every_module = pytest.mark.parametrize("made", MAKERS.values(), ids=MAKERS.keys())


@pytest.mark.parametrize("first", [None, torch.ones(3)])
@every_module
def test_an_assigned_prior_is_normalised(made, first):
    module = made(first)
    module.prior = COUNTS.long()
    torch.testing.assert_close(module.prior, made(COUNTS).prior, check_dtype=False)
    assert "prior" in module.state_dict()
    module.prior = None
    assert module.prior is None


def test_losses_and_probabilities_see_an_assigned_prior():
    criterion = TaylorSoftmaxLoss(prior=torch.ones(3))
    criterion.prior = COUNTS
    loss = criterion(torch.zeros(1, 3), torch.tensor([0]))
    torch.testing.assert_close(loss, torch.tensor(10.0).log())
    head, hidden = LinearSphericalLoss(5, 3, prior=torch.ones(3)), torch.randn(4, 5)
    head.prior = COUNTS
    every, each = head.log_prob(hidden), head.log_prob(hidden, torch.arange(3))
    torch.testing.assert_close(each, every)
    torch.testing.assert_close(each.exp().sum(1), torch.ones(4))


WRONG = {
    "prior must be positive": (ValueError, -COUNTS),
    "prior must not require a gradient": (ValueError, nn.Parameter(COUNTS.clone())),
    r"prior must have shape \(num_classes,\)": (ValueError, torch.ones(1, 3)),
    "prior must be a tensor": (TypeError, [1, 3, 6]),
}


@pytest.mark.parametrize("message", WRONG)
@every_module
def test_a_wrong_prior_is_refused_when_it_is_assigned(made, message):
    module = made(COUNTS)
    before = module.prior.clone()
    kind, value = WRONG[message]
    with pytest.raises(kind, match=message):
        module.prior = value
    assert torch.equal(module.prior, before)


@every_module
def test_an_assigned_prior_of_a_wrong_length_is_refused_when_it_is_used(made):
    module = made(None)
    module.prior = torch.ones(2)
    width = 5 if isinstance(module, LinearSphericalLoss) else 3
    with pytest.raises(ValueError, match=r"prior must have shape \(3,\)"):
        module(torch.zeros(1, width), torch.tensor([0]))


@every_module
def test_assigning_a_normalised_prior_keeps_every_bit(made):
    module = made(torch.rand(3, dtype=torch.float64) + 0.1)
    other = copy.deepcopy(module)
    other.prior = module.prior
    assert torch.equal(other.prior, module.prior)
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other.prior, module.prior)


ASSIGNED_WEIGHTS = {
    "weight must be a floating-point tensor": torch.ones(3).bool(),
    r"must have shape \(3,\)": torch.ones(2),
}


@pytest.mark.parametrize("message", ASSIGNED_WEIGHTS)
@every_module
def test_assigned_class_weights_are_checked_when_they_are_used(made, message):
    module = made(None)
    layer = isinstance(module, LinearSphericalLoss)
    setattr(module, "class_weight" if layer else "weight", ASSIGNED_WEIGHTS[message])
    with pytest.raises((TypeError, ValueError), match=message):
        module(torch.zeros(1, 5 if layer else 3), torch.tensor([0]))


def in_place(module, arguments):
    module.prior.copy_(COUNTS)
    module(*arguments)


def as_a_buffer(module, arguments):
    module.register_buffer("prior", COUNTS)
    module(*arguments)


def as_data(module, arguments):
    module.prior.data = torch.full((3,), torch.nan)
    module(*arguments)


def by_functional_call(module, arguments):
    torch.func.functional_call(module, {"prior": COUNTS}, arguments)


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("way", [in_place, as_a_buffer, as_data, by_functional_call])
@every_module
def test_a_buffer_that_is_not_normalised_is_refused_when_it_is_used(made, way):
    module = made(torch.ones(3))
    width = 5 if isinstance(module, LinearSphericalLoss) else 3
    with pytest.raises(ValueError, match=r"prior must sum to num_classes = 3, got (10|nan)"):
        way(module, (torch.zeros(1, width), torch.tensor([0])))
