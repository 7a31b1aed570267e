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
