"""Options and states of FactoredSGD's momentum that are refused."""

from __future__ import annotations

import pytest
import torch

from _one_batch import D, backward, d, layer, with_momentum
from softsphere import FactoredSphericalLoss
from softsphere.matrix import SingularStepError
from softsphere.optim import FactoredSGD


@pytest.mark.parametrize("option", ["weight_decay", "momentum", "dampening", "lr"])
def test_an_option_that_is_no_number_is_refused_before_the_step(option):
    head = layer()
    optimizer = with_momentum(head, 0)
    optimizer.param_groups[0][option] = float("nan")
    before = head.dense()
    backward(head)
    with pytest.raises(ValueError, match=option.replace("lr", "learning rate")):
        optimizer.step()
    assert torch.equal(head.dense(), before)


def test_a_first_step_that_is_refused_begins_no_momentum():
    head, other = layer(), layer()
    optimizer = with_momentum(head, 0, dampening=0.5)
    backward(head, float("nan"))
    with pytest.raises(SingularStepError):
        optimizer.step()
    backward(head)
    optimizer.step()
    with_momentum(other, 1, dampening=0.5)
    torch.testing.assert_close(head.dense(), other.dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(d + 1, D), (d, D - 3), (d, D + 3)])
def test_momentum_of_another_layer_is_refused(shape):
    head, foreign = layer(), FactoredSphericalLoss(*shape, dtype=torch.float64)
    optimizer, state = with_momentum(head), FactoredSGD(foreign.parameters(), momentum=0.9)
    foreign(torch.zeros(1, shape[0]).double(), torch.tensor([0])).backward()
    state.step()
    optimizer.load_state_dict(state.state_dict())
    before = head.dense()
    backward(head)
    with pytest.raises(ValueError, match="the optimizer's state is that of another layer"):
        optimizer.step()
    assert torch.equal(head.dense(), before)
