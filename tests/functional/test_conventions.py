"""What every form of a loss asks of its options, and what nn.CrossEntropyLoss takes for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from _cases import CASES
from _engines import ENGINES, SPHERICAL
from softsphere import (
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SoftMarginSoftmaxLoss,
    SphericalLoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    losses,
)
from softsphere.functional import linear_spherical_loss, log_prob, spherical_loss

ALL = sorted(CASES)
LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 2, 1, 2])
CRITERIA = (TaylorSoftmaxLoss, SphericalSoftmaxLoss, SoftMarginSoftmaxLoss)


def wanted() -> torch.Tensor:
    return torch.ones(3, requires_grad=True)


def in_forward_mode(pi):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(pi.detach(), torch.ones(3))
        return linear_spherical_loss(LOGITS, torch.eye(3), TARGET, "taylor_softmax", prior=dual)


# Every way to give a prior.
PRIORS: dict[str, Callable[[torch.Tensor], object]] = {
    **{
        f"spherical_loss {name}": lambda pi, name=name: spherical_loss(
            LOGITS, TARGET, CASES[name][0], prior=pi
        )
        for name in ALL
    },
    **{
        f"linear_spherical_loss {engine}": lambda pi, engine=engine: linear_spherical_loss(
            LOGITS, torch.eye(3), TARGET, "z_loss", prior=pi, options=ENGINES[engine]
        )
        for engine in ENGINES
    },
    "label smoothing": lambda pi: spherical_loss(
        LOGITS, TARGET, "taylor_softmax", prior=pi, label_smoothing=0.1
    ),
    "class probabilities": lambda pi: spherical_loss(
        LOGITS, torch.ones(4, 3) / 3, "taylor_softmax", prior=pi
    ),
    "log_prob": lambda pi: log_prob(LOGITS, "taylor_softmax", prior=pi),
    "SphericalLoss": lambda pi: SphericalLoss("taylor_softmax", prior=pi),
    "LinearSphericalLoss": lambda pi: LinearSphericalLoss(2, 3, prior=pi),
    "FactoredSphericalLoss": lambda pi: FactoredSphericalLoss(2, 3, prior=pi),
    "under torch.func.grad": lambda pi: torch.func.grad(
        lambda x: spherical_loss(LOGITS, TARGET, "taylor_softmax", prior=x)
    )(pi.detach()),
    "under torch.func.jvp": lambda pi: torch.func.jvp(
        lambda x: spherical_loss(LOGITS, TARGET, "taylor_softmax", prior=x),
        (pi.detach(),),
        (torch.ones(3),),
    ),
    "under torch.func.jacfwd": lambda pi: torch.func.jacfwd(
        lambda x: log_prob(LOGITS, "taylor_softmax", prior=x)
    )(pi.detach()),
    "in forward mode": in_forward_mode,
}


@pytest.mark.parametrize("way", PRIORS)
def test_a_prior_has_no_gradient_and_says_so(way):
    with pytest.raises(ValueError, match=r"prior must not require a gradient.*prior\.detach"):
        PRIORS[way](wanted())


@pytest.mark.parametrize("use", ["loss", "log_prob", "head"])
def test_a_prior_that_comes_to_want_a_gradient_is_refused_when_used(use):
    criterion = SphericalLoss("taylor_softmax", prior=torch.ones(3))
    head = LinearSphericalLoss(3, 3, prior=torch.ones(3))
    criterion.prior.requires_grad_()
    head.prior.requires_grad_()
    calls = {
        "loss": lambda: criterion(LOGITS, TARGET),
        "log_prob": lambda: criterion.log_prob(LOGITS),
        "head": lambda: head(LOGITS, TARGET),
    }
    with pytest.raises(ValueError, match="prior must not require a gradient"):
        calls[use]()


@pytest.mark.parametrize("form", ["indices", "smoothed", "probabilities", "sparse", *ENGINES])
@pytest.mark.parametrize("name", SPHERICAL)
def test_class_weights_have_the_gradient_of_finite_differences(name, form):
    loss = SPHERICAL[name]
    if (form == "smoothed" and not loss.smoothable) or (
        isinstance(loss, losses.SquaredError) and form in ("probabilities", "sparse")
    ):
        pytest.skip("the loss does not have it")
    o = LOGITS.double()

    def value(w):
        if form == "smoothed":
            return spherical_loss(o, TARGET, loss, weight=w, label_smoothing=0.2)
        if form == "probabilities":
            return spherical_loss(o, o.softmax(1), loss, weight=w)
        if form == "sparse":
            pairs = torch.stack([TARGET, (TARGET + 1) % 3], 1)
            return spherical_loss(o, pairs, loss, weight=w, target_values=o[:, :2])
        if form == "indices":
            return spherical_loss(o, TARGET, loss, weight=w)
        W = torch.eye(3).double()
        return linear_spherical_loss(o, W, TARGET, loss, weight=w, options=ENGINES[form])

    assert torch.autograd.gradcheck(value, torch.tensor([0.5, 1.0, 2.0]).double().requires_grad_())


def test_counts_keep_their_digits_for_float64_logits():
    counts = torch.tensor([1, 3, 16_777_217])
    logits = LOGITS.double()
    want = log_prob(logits, "taylor_softmax", prior=counts.double())
    assert torch.equal(log_prob(logits, "taylor_softmax", prior=counts), want)
    criterion = TaylorSoftmaxLoss(prior=counts)
    assert torch.equal(criterion.log_prob(logits), want)
    assert criterion(LOGITS, TARGET).dtype == torch.float32
    loss = spherical_loss(logits, TARGET, "taylor_softmax", prior=counts)
    torch.testing.assert_close(loss, -want.gather(1, TARGET[:, None]).mean(), rtol=1e-14, atol=0)
    head = LinearSphericalLoss(3, 3, prior=counts, dtype=torch.float64)
    assert head.prior.dtype == torch.float64
    assert torch.equal(head.prior, criterion.prior)


def test_counts_move_to_a_device_without_float64():
    def to_device(x):
        if x.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return x.clone()

    counts = torch.tensor([1, 3, 4])
    criterion = TaylorSoftmaxLoss(prior=counts)._apply(to_device)
    assert torch.equal(criterion.prior, TaylorSoftmaxLoss(prior=counts.float()).prior)


@pytest.mark.once("values are checked on a CPU alone")
def test_a_prior_that_float32_cannot_hold_is_refused_for_float32_logits():
    criterion = TaylorSoftmaxLoss(prior=torch.tensor([1e-37, 1.0, 1e12]).double())
    assert criterion(LOGITS.double(), TARGET).isfinite()
    for call in (lambda: criterion(LOGITS, TARGET), lambda: criterion.log_prob(LOGITS)):
        with pytest.raises(ValueError, match="prior spans more than"):
            call()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_class_weights_come_first_as_in_cross_entropy(criterion):
    weight = torch.tensor([0.5, 1.0, 2.0])
    got = criterion(weight)(LOGITS, TARGET)
    assert torch.equal(got, criterion(weight=weight)(LOGITS, TARGET))
    assert not torch.equal(got, criterion()(LOGITS, TARGET))
    with pytest.raises(TypeError, match="weight must be a tensor"):
        criterion(2)


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("criterion", [*CRITERIA, LinearSphericalLoss])
def test_no_row_is_ignored_with_none(criterion):
    target = torch.tensor([0, -100, 1, 2])
    if criterion is LinearSphericalLoss:
        layer = criterion(3, 3, ignore_index=None)
    else:
        layer = criterion(ignore_index=None)
    assert layer.ignore_index is None
    with pytest.raises(ValueError, match=r"target must be in \[0, 3\), got -100"):
        layer(LOGITS, target)
    layer.ignore_index = -100
    assert layer(LOGITS, target).isfinite()


@pytest.mark.once("values are checked on a CPU alone")
def test_no_row_of_sparse_targets_is_ignored_with_none():
    target, values = torch.full((4, 2), -100), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"or -1 for padding, got -100"):
        spherical_loss(LOGITS, target, "z_loss", target_values=values, ignore_index=None)
    probabilities = LOGITS.softmax(1)
    spherical_loss(LOGITS, probabilities, "z_loss", ignore_index=None)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_ignore_index_by_a_tensor_without_dimensions(kind):
    criterion = TaylorSoftmaxLoss(ignore_index=torch.tensor(2, dtype=kind))
    assert criterion.ignore_index == 2
    assert type(criterion.ignore_index) is int
    want = nn.functional.cross_entropy(LOGITS, TARGET, ignore_index=2)
    got = spherical_loss(LOGITS, TARGET, "softmax", ignore_index=torch.tensor(2, dtype=kind))
    torch.testing.assert_close(got, want)


def test_settings_may_be_assigned_and_are_checked_when_used():
    criterion = TaylorSoftmaxLoss()
    criterion.reduction = "sum"
    want = spherical_loss(LOGITS, TARGET, "taylor_softmax", reduction="sum")
    assert torch.equal(criterion(LOGITS, TARGET), want)
    criterion.reduction = "avg"
    with pytest.raises(ValueError, match="reduction must be one of"):
        criterion(LOGITS, TARGET)
    criterion.reduction, criterion.weight = "mean", torch.ones(4)
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\)"):
        criterion(LOGITS, TARGET)


WRONG = {
    "ignore_index must be an integer, got 1.5": {"ignore_index": 1.5},
    "ignore_index must be an integer, got True": {"ignore_index": True},
    "label_smoothing must be between 0 and 1, got 2.0": {"label_smoothing": torch.tensor(2.0)},
    "label_smoothing must not require a gradient": {
        "label_smoothing": torch.tensor(0.1, requires_grad=True)
    },
    "label_smoothing must be a number": {"label_smoothing": torch.tensor([0.1])},
    r"weight must be a floating-point tensor, got torch.complex64; use weight\.real": {
        "weight": torch.ones(3, dtype=torch.complex64)
    },
    "prior must be a tensor of class frequencies": {"prior": torch.ones(3).to(torch.complex64)},
    r"weight must have shape \(num_classes,\)": {"weight": torch.ones(3, 1)},
    r"prior must have shape \(2,\)": {"prior": torch.ones(3), "weight": torch.ones(2)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_refused_at_construction(message):
    with pytest.raises((TypeError, ValueError), match=message):
        SphericalLoss("taylor_softmax", **WRONG[message])


@pytest.mark.parametrize("name", [x for x in ALL if not CASES[x][0].smoothable])
def test_label_smoothing_that_a_loss_has_not_is_refused_at_construction(name):
    with pytest.raises(ValueError, match="label_smoothing has no meaning"):
        SphericalLoss(CASES[name][0], label_smoothing=0.1)
    if isinstance(CASES[name][0], losses.Spherical):
        with pytest.raises(ValueError, match="label_smoothing has no meaning"):
            LinearSphericalLoss(2, 3, CASES[name][0], label_smoothing=0.1)
