"""Checkpoints that are not made by torch.save, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from _devices import check_repeated
from _subject import KINDS, Subject, dense
from softsphere import SphericalLoss

safetensors = pytest.importorskip("safetensors.torch")


def trained(kind: str) -> Subject:
    subject = Subject(kind)
    subject.train(3)
    return subject


def goes_on(one: Subject, two: Subject) -> None:
    """Checks that both take the same steps from now on."""
    assert torch.equal(one.W, two.W)
    two.generator.set_state(one.generator.get_state())
    one.train(3)
    two.train(3)
    check_repeated(one.W, two.W)


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_of_a_state_dict(kind, tmp_path):
    one, two = trained(kind), Subject(kind)
    safetensors.save_file(one.model.state_dict(), tmp_path / "model.safetensors")
    two.model.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    goes_on(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_of_a_model(kind, tmp_path):
    one, two = trained(kind), Subject(kind)
    safetensors.save_model(one.model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(two.model, str(tmp_path / "model.safetensors"))
    goes_on(one, two)


@pytest.mark.once("a checkpoint is read on a CPU")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoints_of_model_and_optimizer(kind, tmp_path):
    """They are loaded into a new head and a new optimizer, with the momentum."""
    one, two = Subject(kind), Subject(kind)
    optimizers = [s.with_momentum(weight_decay=0.01) for s in (one, two)]
    one.train(3, optimizers[0])
    model, optimizer = get_state_dict(one.model, optimizers[0])
    checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    model, optimizer = get_state_dict(two.model, optimizers[1])
    state = {"model": model, "optimizer": optimizer}
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        two.model,
        optimizers[1],
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    two.generator.set_state(one.generator.get_state())
    for subject, each in zip((one, two), optimizers, strict=True):
        subject.train(3, each)
    torch.testing.assert_close(two.W, one.W, rtol=1e-12, atol=1e-12)


def test_the_names_in_a_state_dict_are_those_of_a_linear_layer():
    for kind in sorted({*KINDS} - {"clustered"}):  # which has a root beside them
        assert list(Subject(kind).head.state_dict()) == ["weight", "bias"], kind


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_saving_copies_nothing_until_the_layer_is_stepped(key):
    subject = trained("factored")
    state = subject.head.state_dict()
    places = {name: value.data_ptr() for name, value in state.items()}
    assert {n: v.data_ptr() for n, v in subject.head.state_dict().items()} == places
    kept = {key: state[key]}  # the other one is dropped, and so not copied
    before = kept[key].clone()
    del state
    subject.train(1)
    assert torch.equal(kept[key], before)
    after = {name: value.data_ptr() for name, value in subject.head.state_dict().items()}
    assert {name for name in places if after[name] != places[name]} == {key}


def test_a_change_behind_the_factors_is_refused():
    """During training V is not W, so that a change of V has no meaning for W."""
    subject = trained("factored")
    subject.head.matrix.arrays.V.blocks[0].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place by other means"):
        subject.loss()


@pytest.mark.once("a checkpoint is read on a CPU")
@pytest.mark.parametrize("prior", [False, True])
def test_meta_device_and_reset_parameters(prior):
    counts = torch.arange(1.0, 24.0) if prior else None
    with torch.device("meta"):
        head = KINDS["factored"](prior=counts)
    head.to_empty(device="cpu")
    torch.manual_seed(0)
    head.reset_parameters()
    torch.manual_seed(0)
    other = KINDS["factored"](prior=counts)
    assert torch.equal(dense(head), dense(other))
    hidden, target = torch.randn(4, 5), torch.arange(4)
    torch.testing.assert_close(head(hidden, target), other(hidden, target))


def test_a_prior_without_values_is_refused():
    with torch.device("meta"):
        head = KINDS["factored"](prior=torch.ones(23))
    head.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="prior was on the meta device"):
        head.reset_parameters()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["linear", "factored", "criterion"])
def test_counts_that_are_loaded_as_the_prior_are_normalised(kind, assign):
    """They have the dtype of the prior, as a checkpoint written by hand may have them."""
    counts = torch.arange(1.0, 24.0)
    made = [
        SphericalLoss("taylor_softmax", prior=counts)
        if kind == "criterion"
        else KINDS[kind](prior=counts)
        for _ in range(2)
    ]
    state = made[0].state_dict()
    saved = state["prior"].clone()
    made[1].load_state_dict({**state, "prior": counts}, assign=assign)
    torch.testing.assert_close(made[1].state_dict()["prior"], saved)
    made[1].load_state_dict(state, assign=assign)
    assert torch.equal(made[1].state_dict()["prior"], saved)
    with pytest.raises(RuntimeError, match="prior cannot be loaded: prior must be positive"):
        made[1].load_state_dict({**state, "prior": -counts}, assign=assign)
