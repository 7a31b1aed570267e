"""Attributes of layers: each can be looked up, and what is assigned has an effect or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
    TaylorSoftmaxLoss,
)
from softsphere.losses import SphericalSoftmax

D, d = 30, 3
CLUSTERS = torch.arange(D) % 4 - 1
LAYERS = {
    "criterion": TaylorSoftmaxLoss,
    "linear": lambda **given: LinearSphericalLoss(d, D, **given),
    "factored": lambda **given: FactoredSphericalLoss(d, D, **given),
    "sampled": lambda **given: SampledSoftmaxLoss(d, D, 10, **given),
    **{
        f"clusters, {engine}": lambda engine=engine, **given: ClusteredLoss(
            d, D, **{"assignment": CLUSTERS, "engine": engine, **given}
        )
        for engine in ("auto", "logits", "gram", "factored")
    },
}
# Another value of each argument of a constructor, by the name of its attribute.
OTHER = {
    "in_features": 4,
    "num_classes": 31,
    "num_samples": 5,
    "assignment": CLUSTERS.flip(0),
    "loss": "spherical_softmax",
    "leaf": "spherical_softmax",
    "leaf_features": 2,
    "bias": False,
    "prior": torch.arange(1.0, D + 1),
    "counts": torch.arange(1.0, D + 1),
    "class_weight": torch.arange(1.0, D + 1),
    "reduction": "sum",
    "ignore_index": 7,
    "label_smoothing": 0.3,
    "options": LinearSphericalOptions(engine="dense"),
    "engine": "logits",
    "sampler": "in_batch",
    "power": 0.5,
    "sparse": True,
    "process_group": object(),
    "replicated": True,
    "averaged": True,
}
# Those of a LinearSphericalLoss that would change the loss of other layers as well.
OF_LINEAR = {"prior", "class_weight", "label_smoothing"}
# Those that may leave a loss as it is.
SAME = {"options", "engine", "sparse"}
# Losses that a layer cannot compute.
UNFIT = [
    ("factored", "softmax"),
    ("sampled", "taylor_softmax"),
    ("clusters, auto", "z_loss"),
    ("clusters, gram", "softmax"),
    ("clusters, factored", "softmax"),
]


def arguments(layer: str) -> list[str]:
    """The arguments of the constructor by the names of their attributes, and the loss."""
    names = inspect.signature(type(LAYERS[layer]())).parameters.keys() - {"device", "dtype"}
    # the class weights have another name in a layer, whose weight is W
    taken = {"class_weight" if name == "weight" else name for name in names}
    return sorted(taken | {"loss"} | OF_LINEAR)


def value(head: torch.nn.Module) -> torch.Tensor:
    """A loss with gradients, whose draws are always the same."""
    torch.manual_seed(0)
    hidden, target = torch.randn(5, d), torch.tensor([0, 7, 7, 3, 29])
    loss = head(hidden, target)
    head.zero_grad()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("layer", LAYERS)
def test_every_attribute_can_be_looked_up(layer):
    made = LAYERS[layer]()
    assert {"forward", "training"} <= {name for name, _ in inspect.getmembers(made)}


def refusal(of: Callable[[], object]) -> Exception | None:
    """How something is refused; None where it is not."""
    try:
        of()
    except (AttributeError, TypeError, ValueError) as error:
        return error
    return None


CASES = [(layer, name) for layer in LAYERS if layer != "criterion" for name in arguments(layer)]


@pytest.mark.parametrize(("layer", "name"), CASES)
def test_an_argument_that_is_assigned_has_its_effect_or_is_refused(layer, name):
    head, other = LAYERS[layer](), OTHER[name]
    before, kept = value(head), repr(getattr(head, name, None))
    if (refused := refusal(lambda: setattr(head, name, other))) is not None:
        assert name in str(refused)
        assert torch.equal(value(head), before)
        assert repr(getattr(head, name, None)) == kept
        return
    if (refused := refusal(lambda: value(head))) is not None:
        assert name in str(refused)
        return
    argument = {"class_weight": "weight"}.get(name, name)
    if name == "loss" and layer.startswith("clusters"):
        argument = "leaf"
    made = LAYERS[layer](**{argument: other})
    made.load_state_dict({**made.state_dict(), **head.state_dict()}, strict=False)
    found = value(head)
    assert torch.equal(found, value(made))
    assert name in SAME or not torch.equal(found, before)


@pytest.mark.parametrize(("layer", "loss"), UNFIT)
def test_a_loss_that_the_layer_cannot_compute_is_refused_when_it_is_assigned(layer, loss):
    head = LAYERS[layer]()
    before = value(head)
    with pytest.raises(TypeError, match=r"loss .*must be|leaf"):
        head.loss = loss
    assert torch.equal(value(head), before)


def test_the_same_assignment_may_be_assigned():
    head = LAYERS["clusters, auto"]()
    head.assignment = head.assignment.clone()
    moved = LAYERS["clusters, auto"]().to("meta")
    moved.load_state_dict(head.state_dict(), assign=True)
    assert torch.equal(value(moved), value(head))


@pytest.mark.parametrize(
    ("layer", "name", "other"),
    [
        ("factored", "prior", nn.Parameter(OTHER["prior"])),
        ("factored", "in_features", nn.Parameter(torch.ones(1))),
        ("sampled", "counts", nn.Parameter(OTHER["counts"])),
        ("clusters, auto", "counts", nn.Parameter(OTHER["counts"])),
        ("clusters, auto", "leaf", nn.Identity()),
        ("clusters, auto", "assignment", nn.Parameter(CLUSTERS.float())),
        ("clusters, auto", "assignment", nn.Parameter(CLUSTERS, requires_grad=False)),
    ],
)
def test_neither_a_parameter_nor_a_module_takes_its_place(layer, name, other):
    head = LAYERS[layer]()
    with pytest.raises(AttributeError, match=f"{name} of a .* cannot be changed"):
        setattr(head, name, other)
    assert name not in dict(head.named_parameters())
    assert other not in list(head.modules())


@pytest.mark.parametrize("layer", ["factored", "clusters, factored"])
def test_a_subclass_may_keep_the_sizes_as_well(layer):
    kind = type(LAYERS[layer]())

    class Own(kind):
        def __init__(self, in_features, num_classes, *given):
            self.in_features = in_features
            super().__init__(in_features, num_classes, *given)
            self.num_classes = num_classes

    head = Own(d, D, *([CLUSTERS] if kind is ClusteredLoss else []))
    assert (head.in_features, head.num_classes) == (d, D)
    with pytest.raises(AttributeError, match="in_features of a Own cannot be changed"):
        del head.in_features


def test_an_argument_that_is_kept_under_another_name_is_read_by_its_own():
    prior = torch.arange(1.0, D + 1)
    head = LAYERS["factored"](prior=prior)
    torch.testing.assert_close(head.prior, prior * D / prior.sum())
    assert LAYERS["factored"]().prior is None
    clustered = LAYERS["clusters, auto"](leaf="spherical_softmax")
    assert clustered.leaf == clustered.loss == SphericalSoftmax()


@pytest.mark.parametrize(("loss", "error"), [("taylor", ValueError), ("softmax", TypeError)])
def test_an_error_of_a_factored_layer_lists_the_losses_that_it_takes(loss, error):
    with pytest.raises(error, match=r"one of squared_error, .*z_loss") as raised:
        LAYERS["factored"](loss=loss)
    assert "higher_taylor_softmax" not in str(raised.value)
