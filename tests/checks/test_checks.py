"""Every wrong argument names itself, what came, and what would do."""

import pytest
import torch

import softsphere
from softsphere import functional, losses

LOGITS, TARGET = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])

WRONG = {
    "reduction must be one of mean, sum, none, got 'avg'": lambda: call(reduction="avg"),
    "label_smoothing must be between 0 and 1, got 2": lambda: call(label_smoothing=2),
    r"weight must have shape \(3,\).*got \(4,\)": lambda: call(weight=torch.ones(4)),
    r"prior must have shape \(3,\).*got \(2,\)": lambda: call(prior=torch.ones(2)),
    "prior must be positive.*-1 to 1": lambda: call(prior=torch.tensor([1.0, -1.0, 1.0])),
    "prior must be positive.*0 to 0": lambda: call(prior=torch.zeros(3)),
    r"target must be in \[0, 3\) or ignore_index = -100, got 3": lambda: call(target=TARGET + 1),
    r"must have shape \(4,\).*got \(3,\)$": lambda: call(target=TARGET[:3]),
    r"got \(2, 7\); classes are expected at dimension 1, so use logits.movedim\(-1, 1\)": lambda: (
        functional.spherical_loss(torch.ones(2, 7, 5), torch.ones(2, 7).long(), "taylor_softmax")
    ),
    r"must have shape \(4,\).*got \(4, 1\); use target.squeeze\(-1\)": lambda: call(
        target=TARGET[:, None]
    ),
    r"must have the shape of logits \(4, 3\), got \(4,\).*target\.long": lambda: call(
        target=TARGET.float()
    ),
    "got a scalar": lambda: call(logits=torch.tensor(1.0), target=TARGET[0]),
    "at least one class": lambda: call(logits=torch.zeros(4, 0)),
    "loss must be one of .*taylor_softmax.*got 'hinge'$": lambda: call(loss="hinge"),
    "got 'cross_entropy'; .* is \"softmax\"": lambda: call(loss="cross_entropy"),
    "unobserved must be positive and finite, got 0": lambda: losses.SquaredError(0),
    "unobserved must be at most 1, .* got 1.5": lambda: losses.SquaredError(1.5),
    "eps must be positive and finite, got 0": lambda: losses.SphericalSoftmax(eps=0),
    "a must be positive": lambda: losses.ZLoss(a=-1.0),
    "b must be finite": lambda: losses.ZLoss(b=float("nan")),
    "order must be even and from 2 to 20, got 3.*of odd": lambda: functional.taylor_softmax(
        LOGITS, order=3
    ),
    "margin must be zero or positive": lambda: softsphere.SoftMarginSoftmaxLoss(margin=-1.0),
    "BouchardBound needs at least 2 classes": lambda: call(
        logits=torch.zeros(4, 1), target=torch.zeros(4, dtype=torch.long), loss="bouchard_bound"
    ),
    r"target_values must have the shape of target \(4, 1\)": lambda: call(
        target=TARGET[:, None], target_values=torch.ones(4, 2)
    ),
    r"shape \(N, K\)": lambda: call(target=TARGET, target_values=torch.ones(4)),
    "weight has no meaning for the squared error": lambda: call(
        loss="squared_error", target=torch.ones(4, 3), weight=torch.ones(3)
    ),
    "label_smoothing has no meaning with target_values": lambda: call(
        target=TARGET[:, None], target_values=torch.ones(4, 1), label_smoothing=0.1
    ),
}

WRONG_TYPE = {
    "input must be a floating-point tensor, got torch.int64": lambda: call(logits=LOGITS.long()),
    "input must be a floating-point tensor, got a list of length": lambda: call(logits=[1.0]),
    "target must be a tensor": lambda: call(target=[0, 1, 2, 0]),
    r"target must hold class indices.*got torch.bool.*target\.long": lambda: call(
        target=TARGET.bool()
    ),
    "loss must be a name.*got 3$": lambda: call(loss=3),
    'loss must be a name.*is "softmax"': lambda: call(loss=torch.nn.CrossEntropyLoss()),
    r"loss must be a name.*a value of that type, ZLoss\(\)": lambda: call(loss=losses.ZLoss),
    "loss must be a name.*the attribute loss": lambda: call(
        loss=softsphere.SphericalLoss("taylor_softmax")
    ),
    "prior must be a tensor": lambda: call(prior=[1.0, 1.0, 1.0]),
    "weight must be a tensor": lambda: call(weight=[1.0, 1.0, 1.0]),
    "order must be an even integer": lambda: losses.HigherTaylorSoftmax(4.0),
    "eps must be a number": lambda: losses.SphericalSoftmax("1"),
}


def call(logits=LOGITS, target=TARGET, loss="taylor_softmax", **options):
    return functional.spherical_loss(logits, target, loss, **options)


@pytest.mark.parametrize("message", WRONG)
def test_value_errors(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


@pytest.mark.parametrize("message", WRONG_TYPE)
def test_type_errors(message):
    with pytest.raises(TypeError, match=message):
        WRONG_TYPE[message]()


def test_wrong_index_inside_vmap_is_not_silent():
    with pytest.raises((ValueError, RuntimeError)):
        torch.func.vmap(lambda o, t: call(o, t))(LOGITS, TARGET + 1)


@pytest.mark.parametrize("argument", ["linear_weight", "linear_bias"])
def test_a_K_dimensional_layer_is_on_the_device_of_its_input(argument):
    given = {"linear_weight": torch.ones(5, 2, 4), "linear_bias": torch.ones(5, 2)}
    given[argument] = given[argument].to("meta")
    with pytest.raises(ValueError, match=f"{argument} must be on the device of input, cpu, got"):
        functional.linear_spherical_loss(
            torch.ones(3, 4),
            target=torch.zeros(3, 2, dtype=torch.long),
            loss="taylor_softmax",
            **given,
        )
