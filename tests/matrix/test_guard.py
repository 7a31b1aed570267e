"""Optimizers that cannot step a factored weight are refused before anything moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from _one_batch import d, layer, rows, target


class Kept(torch.optim.AdamW):
    """An optimizer of somebody's own."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Kept])
def test_a_closure_does_not_hide_the_gradient_from_the_question(kind):
    head, trunk = layer(), nn.Linear(d, d).double()
    optimizer = kind([{"params": trunk.parameters()}, {"params": head.parameters()}])

    def closure():
        loss = head(trunk(rows), target)
        loss.backward()
        return loss

    before = trunk.weight.detach().clone()
    with pytest.raises(TypeError, match="cannot step a factored weight"):
        optimizer.step(closure)
    assert torch.equal(trunk.weight, before)


class Told(torch.optim.Optimizer):
    """An optimizer whose step has arguments of its own, and that tells what it was called with."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, *args, **options):
        self.args, self.options = args, options


@pytest.mark.parametrize("make", [layer, lambda: nn.Linear(d, d)])
@pytest.mark.parametrize(
    ("args", "options"),
    [
        (([1, 2],), {}),
        ((None, 0.5), {"scale": 3}),
        ((), {"grads": (1, 2)}),
        ((), {"closure": 7}),
    ],
)
def test_the_arguments_of_a_step_arrive_as_they_were_given(make, args, options):
    optimizer = Told(make().parameters())
    optimizer.step(*args, **options)
    assert (optimizer.args, optimizer.options) == (args, options)


@pytest.mark.parametrize("make", [layer, lambda: nn.Linear(d, d)])
def test_arguments_beside_a_closure_arrive_too(make):
    optimizer = Told(make().parameters())
    optimizer.step(lambda: 5, 0.5, scale=3)
    closure, *more = optimizer.args
    assert (closure(), more, optimizer.options) == (5, [0.5], {"scale": 3})
    optimizer.step(closure=lambda: 5, scale=3)
    assert optimizer.args == ()
    assert optimizer.options.pop("closure")() == 5
    assert optimizer.options == {"scale": 3}


def test_a_closure_of_others_is_left_alone():
    def closure():
        return 5

    optimizer = Told(nn.Linear(d, d).parameters())
    optimizer.step(closure)
    assert optimizer.args == (closure,)
