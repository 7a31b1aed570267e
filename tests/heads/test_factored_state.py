"""A factored layer saved, loaded, copied and moved."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from _factored import D, d, go_on, layer, train
from softsphere import (
    FactoredSphericalLoss,
)
from softsphere.optim import FactoredSGD


def test_a_weight_changed_in_a_checkpoint_has_its_own_gram_matrix():
    head = layer()
    train(head, 3)
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    state["weight"] *= 2
    head.load_state_dict(state)
    assert head.health().gram_drift < 1e-12


def test_a_float32_checkpoint_leaves_nothing_rounded_in_a_float64_layer():
    prior = torch.rand(D) + 0.1
    narrow, wide = layer(dtype=torch.float32, prior=prior), layer(prior=prior)
    train(narrow, 5)
    wide.load_state_dict(narrow.state_dict())
    assert wide.health().gram_drift < 1e-12
    assert float(wide.matrix.arrays.pi.sum()) == pytest.approx(D, rel=1e-14)


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
@pytest.mark.parametrize("prior", [False, True])
def test_saving_and_loading_goes_on_exactly(sgd, prior):
    counts = torch.arange(1.0, D + 1) if prior else None
    head = layer(prior=counts)
    optimizer = train(head, 30, **sgd)
    weight = head.to_linear().weight
    buffer = io.BytesIO()
    torch.save({"head": head.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    torch.testing.assert_close(state["head"]["weight"], weight, rtol=1e-12, atol=1e-12)
    other = FactoredSphericalLoss(d, D, prior=counts, dtype=torch.float64)
    resumed = FactoredSGD(other.parameters(), lr=0.5, **sgd)
    other.load_state_dict(state["head"])
    resumed.load_state_dict(state["optimizer"])
    go_on(head, optimizer, 20, seed=5)
    go_on(other, resumed, 20, seed=5)
    for name, value in head.matrix.arrays.state().items():
        assert torch.equal(value, other.matrix.arrays.state()[name]), name


def test_state_of_a_linear_layer_loads_and_exports():
    linear = nn.Linear(d, D).double()
    head = layer()
    train(head, 3, momentum=0.9)
    assert head.load_state_dict(linear.state_dict())
    torch.testing.assert_close(head.dense()[:, :d], linear.weight.detach())
    torch.testing.assert_close(head.dense()[:, d], linear.bias.detach())
    back = head.to_linear()
    torch.testing.assert_close(back.weight, linear.weight)
    nn.Linear(d, D).load_state_dict(head.state_dict(), strict=False)
    assert set(linear.state_dict()) <= set(head.state_dict())


def test_wrong_states_are_refused_as_pytorch_does():
    head = layer()
    before = head.dense()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        head.load_state_dict(nn.Linear(d + 1, D).state_dict())
    assert torch.equal(head.dense(), before)
    with pytest.raises(RuntimeError, match="Missing key"):
        head.load_state_dict({"weight": torch.zeros(D, d)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        head.load_state_dict({**nn.Linear(d, D).state_dict(), "nonsense": torch.zeros(1)})


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("given", ["weight", "bias", "prior"])
def test_a_part_of_a_state_is_loaded_and_the_rest_stays(given, assign, steps):
    head = layer(prior=torch.rand(D) + 0.1)
    train(head, steps)
    want = {name: x.clone() for name, x in head.state_dict().items()}
    want[given] = torch.rand_like(want[given]) + 0.1
    if given == "prior":
        want[given] *= D / want[given].sum()
    keys = head.load_state_dict({given: want[given].clone()}, strict=False, assign=assign)
    assert keys.missing_keys == [name for name in ("weight", "bias") if name != given]
    torch.testing.assert_close(head.state_dict(), want)
    other = layer(prior=torch.ones(D))
    other.load_state_dict(want)
    train(head, 3)
    train(other, 3)
    torch.testing.assert_close(head.dense(), other.dense())


def test_a_state_of_other_layers_leaves_the_weight_and_its_gradient_alone():
    head = layer()
    optimizer = train(head, 3)
    optimizer.zero_grad()
    head(torch.randn(4, d, dtype=torch.float64), torch.arange(4)).backward()
    before, edition = head.weight._version, head.matrix.arrays.edition
    head.load_state_dict({"of": torch.ones(1)}, strict=False)
    head.load_state_dict({}, strict=False)
    assert (head.weight._version, head.matrix.arrays.edition) == (before, edition)
    optimizer.step()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(how):
    model = nn.Sequential(nn.Linear(d, d).double(), layer())
    train(model[1], 5, momentum=0.9)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    before = model[1].dense()
    torch.testing.assert_close(other[1].dense(), before)
    train(other[1], 3)
    assert torch.equal(model[1].dense(), before)
    assert not torch.equal(other[1].dense(), before)


@pytest.mark.parametrize("begin", [torch.float32, torch.float64])
def test_nothing_stays_rounded_to_float32_in_a_float64_layer(begin):
    head = layer(dtype=begin, prior=torch.rand(D) + 0.1)
    if begin == torch.float32:
        train(head, 5)
        head.double()
    assert float(head.matrix.arrays.pi.sum()) == pytest.approx(D, rel=1e-14)
    assert head.health().gram_drift < 1e-13


def test_moves_between_dtypes_keep_the_matrix_and_its_double_state():
    head = layer(dtype=torch.float32)
    train(head, 5)
    before = head.dense()
    head.double()
    assert head.weight.dtype == torch.float64
    torch.testing.assert_close(head.dense(), before.double())
    train(head, 2)
    head.float()
    assert head.weight.dtype == torch.float32
    assert head.matrix.arrays.U.dtype == torch.float64
    train(head, 2)
    for half in (nn.Sequential(head).half, lambda: nn.Sequential(head).to(torch.bfloat16)):
        with pytest.raises(TypeError, match=r"float32 or float64.*autocast"):
            half()
    assert head.weight.dtype == torch.float32
    train(head, 2)


def test_sharing_between_processes_is_refused():
    with pytest.raises(TypeError, match="cannot be shared between processes"):
        layer().share_memory()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("prior", torch.ones(D + 1), "prior"),
        ("prior", -torch.ones(D), "prior must be positive"),
        ("weight", torch.zeros(D, d + 1), "size mismatch"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(key, value, words):
    head = layer(prior=torch.rand(D) + 0.1)
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    train(head, 3)
    before = head.dense()
    state[key] = value
    with pytest.raises(RuntimeError, match=words):
        head.load_state_dict(state)
    assert torch.equal(head.dense(), before)
