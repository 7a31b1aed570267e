"""A factored weight can be read, saved and moved inside `torch.inference_mode()`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from softsphere import ClusteredLoss, FactoredSphericalLoss

D, d = 60, 4
HEADS = {
    "factored": lambda: FactoredSphericalLoss(d, D, prior=torch.arange(1, D + 1.0)),
    "leaves": lambda: ClusteredLoss(d, D, torch.arange(D) % 6 - 1, engine="factored"),
}


def saved(head):
    return {name: x.clone() for name, x in head.state_dict().items()}


def reloaded(head):
    head.load_state_dict(head.state_dict())
    return saved(head)


CALLS = {
    "state_dict": saved,
    "load_state_dict": reloaded,
    "to": lambda head: saved(head.to(head.weight.device)),
    "deepcopy": lambda head: saved(copy.deepcopy(head)),
    "pickle": lambda head: saved(pickle.loads(pickle.dumps(head))),
    "detach": lambda head: head.weight.detach().norm(),
    "rows": lambda head: head.weight[3:5] + 0,
    "columns": lambda head: head.weight[:, 1] + 0,
    "transpose": lambda head: torch.ones(2, d + 1) @ head.weight.T,
    "linear": lambda head: F.linear(torch.ones(1, d + 1), head.weight),
    "norm": lambda head: head.weight.norm(),
    "loss": lambda head: head(torch.ones(2, d), torch.tensor([3, 6])),
    "log_prob": lambda head: head.log_prob(torch.ones(2, d)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("head", HEADS)
def test_inside_inference_mode_it_is_as_outside(head, call):
    torch.manual_seed(0)
    layer = HEADS[head]()
    with torch.no_grad():
        expected = CALLS[call](layer)
    with torch.inference_mode():
        found = CALLS[call](layer)
        assert_close(found, expected)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(2, d), torch.tensor([3, 6])).backward()
    optimizer.step()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_a_layer_that_is_made_inside_can_be_trained_outside(head):
    with torch.inference_mode():
        made = HEADS[head]()
        before = made.predict(torch.ones(2, d))
    assert before.shape == (2,)
    optimizer = torch.optim.SGD(made.parameters(), 1.0)
    for _ in range(3):
        optimizer.zero_grad()
        made(torch.randn(5, d), torch.arange(5) * 7).backward()
        optimizer.step()
    assert all(x.isfinite().all() for x in saved(made).values())


# With so many classes a layer looks at some rows alone where changes are not counted.
MANY = 200
OF_MANY = {
    "factored": lambda: FactoredSphericalLoss(d, MANY),
    "leaves": lambda: ClusteredLoss(d, MANY, torch.arange(MANY) % 6 - 1, engine="factored"),
}


@pytest.mark.parametrize("head", OF_MANY)
def test_a_state_that_is_assigned_inside_may_be_written_and_trained(head):
    """PyTorch counts no changes of tensors that inference mode has made."""
    torch.manual_seed(0)
    made = OF_MANY[head]()
    rows, target = torch.randn(5, d), torch.tensor([3, 6, 6, 40, 59])
    factored = {"weight", "bias", "assignment"}
    with torch.inference_mode():
        state = {name: x + 0 for name, x in made.state_dict().items() if name in factored}
        made.load_state_dict(state, strict=False, assign=True)
        made(rows, target)
        made.state_dict()["weight"][17].mul_(100)
        other = copy.deepcopy(made)
        other.load_state_dict(made.state_dict())
        assert_close(made(rows, target), other(rows, target))
        assert_close(made.log_prob(rows).exp().sum(1), torch.ones(5))
    optimizer = torch.optim.SGD([made.weight], 0.1)
    loss = made(rows, target)
    loss.backward(inputs=[made.weight])
    optimizer.step()
    assert made(rows, target) < loss
