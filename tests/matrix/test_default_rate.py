"""The learning rate of a factored weight that is given none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softsphere import FactoredSphericalLoss
from softsphere.optim import FactoredSGD


def rates(*params, **options):
    return [group["lr"] for group in FactoredSGD(params, **options).param_groups]


def weights(*sizes):
    return [FactoredSphericalLoss(3, D).weight for D in sizes]


def test_it_grows_with_the_classes_and_is_that_of_sgd_for_ordinary_parameters():
    few, many = weights(50, 5_000)
    ordinary = nn.Linear(2, 2).weight
    groups = [{"params": [x]} for x in (few, many, ordinary)]
    assert rates(*groups) == pytest.approx([0.5, 50.0, 0.001])
    named = [{"params": [("few", few)]}, {"params": [("many", many)], "lr": 3.0}]
    assert rates(*named) == pytest.approx([0.5, 3.0])
    assert rates(*groups, lr=2.0) == [2.0] * 3


def test_momentum_takes_its_share_of_it():
    (few,) = weights(50)
    assert rates({"params": [few], "momentum": 0.9}) == pytest.approx([0.05])
    assert rates(few, momentum=0.5, nesterov=True) == pytest.approx([0.25])


@pytest.mark.parametrize("momentum", [1.0, 1.5])
def test_momentum_that_leaves_no_rate_is_named(momentum):
    (few,) = weights(50)
    with pytest.raises(ValueError, match=f"momentum must be below 1 .*got {momentum:g}; give lr"):
        FactoredSGD([few], momentum=momentum)
    assert FactoredSGD([few], 0.1, momentum=momentum).param_groups[0]["lr"] == 0.1


def test_no_rate_suits_a_factored_weight_and_ordinary_parameters():
    (few,) = weights(50)
    mixed = [few, nn.Linear(2, 2).weight]
    with pytest.raises(ValueError, match="lr must be given for a group with a factored weight"):
        FactoredSGD(mixed)
    assert rates(*mixed, lr=0.1) == [0.1]


def test_factored_weights_that_need_different_rates_are_refused():
    few, many = weights(50, 5_000)
    with pytest.raises(ValueError, match=r"lr must be given for a group.*50, 5,000 classes"):
        FactoredSGD([few, many])
    FactoredSGD([few, many], lr=0.1)
    with pytest.raises((TypeError, ValueError)):
        FactoredSGD([few], lr="fast")
    with pytest.raises(TypeError, match=r"lr must be a number.*got None"):
        FactoredSGD([few], lr=None)


@pytest.mark.parametrize("num_classes", [30, 3_000])
def test_a_layer_learns_with_it_whatever_its_classes(num_classes):
    """Each of eight hidden states has one class that follows it."""
    torch.manual_seed(0)
    head = FactoredSphericalLoss(8, num_classes)
    optimizer = FactoredSGD(head.parameters())
    hidden, target = 3 * torch.eye(8), torch.randint(num_classes, (8,))
    for _ in range(300):
        optimizer.zero_grad()
        head(hidden, target).backward()
        optimizer.step()
    assert torch.equal(head.predict(hidden), target)
