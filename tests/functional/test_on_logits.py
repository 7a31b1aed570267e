"""Losses on logits: offsets, saturation, equal outputs, tracing and many classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import softsphere
from _cases import CASES
from softsphere import SphericalLoss, TaylorSoftmaxLoss, functional, losses

ALL = sorted(CASES)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_keeps_its_digits_at_an_offset(smoothing):
    logits = torch.tensor([[1e4, 1e4 + 1]])
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = SphericalLoss("softmax", label_smoothing=smoothing)(one, torch.tensor([0]))
    want = nn.CrossEntropyLoss(label_smoothing=smoothing)(two, torch.tensor([0]))
    got.backward()
    want.backward()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prior", [False, True])
def test_equal_outputs_are_the_convention_of_the_z_loss(prior):
    generator = torch.Generator().manual_seed(0)
    for classes in range(2, 60):
        counts = torch.rand(classes, generator=generator) + 0.01 if prior else None
        for value in (0.3, -7.7, 1e4):
            logits = torch.full((1, classes), value, requires_grad=True)
            loss = SphericalLoss("z_loss", prior=counts)(logits, torch.tensor([0]))
            loss.backward()
            torch.testing.assert_close(loss, torch.tensor(4.0181), atol=1e-3, rtol=0)
            assert not logits.grad.any()


def test_a_sure_winner_keeps_its_gradient_under_a_margin():
    loss = losses.SoftMarginSoftmax(30.0)
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    every = loss.per_class(logits, None)
    hard = loss.at(logits, torch.tensor([0]), None)
    torch.testing.assert_close(every[:, 0], hard)
    (one,) = torch.autograd.grad(every[0, 0], logits)
    torch.testing.assert_close(one.sum(), torch.tensor(0.0), atol=1e-9, rtol=0)
    assert loss.per_class(torch.zeros(1, 1), None).item() == 0.0


def test_squares_of_a_million_outputs_keep_their_digits():
    o = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(0))
    got = SphericalLoss("squared_error")(o, torch.tensor([0]))
    want = SphericalLoss("squared_error")(o.double(), torch.tensor([0]))
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [4, 10, 20])
def test_high_orders_of_negative_outputs(order):
    o = torch.linspace(-40, 40, 161)
    got = losses.HigherTaylorSoftmax(order).log_numerator(o)
    terms = [torch.ones(161).double()]
    for i in range(1, order + 1):
        terms.append(terms[-1] * o.double() / i)
    want = torch.stack(terms).sum(0).log()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_single_weighted_rows_inside_vmap(name):
    weight, logits, target = torch.rand(5) + 0.5, torch.randn(4, 5), torch.tensor([0, 1, 4, 2])
    kind = CASES[name][0]
    criterion = SphericalLoss(kind, weight=weight, reduction="sum")
    got = vmap(grad(criterion))(logits, target)
    leaf = logits.clone().requires_grad_()
    criterion(leaf, target).backward()
    torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("name", ALL)
def test_forward_mode_and_hessian(name):
    criterion = SphericalLoss(CASES[name][0])
    logits, target = torch.randn(2, 5).double(), torch.tensor([1, 3])
    direction = torch.randn(2, 5).double()
    _, slope = jvp(lambda o: criterion(o, target), (logits,), (direction,))
    gradient = grad(lambda o: criterion(o, target))(logits)
    torch.testing.assert_close(slope, (gradient * direction).sum())
    curvature = hessian(lambda o: criterion(o, target))(logits)
    leaf = logits.clone().requires_grad_()
    (first,) = torch.autograd.grad(criterion(leaf, target), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    torch.testing.assert_close(torch.einsum("abcd,cd->ab", curvature, direction), second)


@pytest.mark.parametrize("name", ["taylor_softmax", "z_loss", "softmax"])
def test_tracing_looks_at_no_values(name):
    criterion = SphericalLoss(name)
    logits, target = torch.randn(3, 5), torch.tensor([0, 4, 1])
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(criterion, tracing_mode=mode)(logits, target)
        torch.testing.assert_close(traced(logits, target), criterion(logits, target))
    with torch.device("meta"):
        made = SphericalLoss(name, prior=torch.ones(5))
    assert made.prior.is_meta


ZEROS = torch.zeros(2, 3)
WRONG = {
    "ignore_index has no meaning for class probabilities": (
        ValueError,
        lambda: SphericalLoss("softmax", ignore_index=1)(torch.zeros(2, 3), torch.ones(2, 3) / 3),
    ),
    "ignore_index must be an integer": (TypeError, lambda: TaylorSoftmaxLoss(ignore_index=1.5)),
    "weight must be a floating-point tensor": (
        TypeError,
        lambda: TaylorSoftmaxLoss(weight=torch.ones(3).bool())(ZEROS, torch.tensor([0, 1])),
    ),
    "order must be an even integer": (TypeError, lambda: TaylorSoftmaxLoss(order=torch.ones(3))),
    "weight must be a tensor": (TypeError, lambda: TaylorSoftmaxLoss(4)),
    "from 2 to 20, got 100": (ValueError, lambda: functional.taylor_softmax(ZEROS, order=100)),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    kind, call = WRONG[message]
    with pytest.raises(kind, match=message):
        call()


def test_a_prior_that_a_narrow_dtype_cannot_hold_is_refused():
    counts = torch.tensor([1e-37, 1.0, 1e12])
    with pytest.raises(ValueError, match="prior spans more than"):
        TaylorSoftmaxLoss(prior=counts)
    assert TaylorSoftmaxLoss(prior=counts.double()).prior.min() > 0


def test_functions_work_along_any_dimension():
    o = torch.randn(3, 4, 2)
    for dim in (0, 1, 2, -1):
        p = functional.taylor_softmax(o, dim=dim)
        torch.testing.assert_close(p.sum(dim), torch.ones_like(p.sum(dim)))
    assert functional.spherical_softmax(torch.zeros(3, 0), dim=0).shape == (3, 0)
    with pytest.raises(ValueError, match="dim must be a dimension"):
        functional.taylor_softmax(o, dim=3)


def test_a_row_without_targets_is_counted():
    empty, values = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0)
    loss = SphericalLoss("squared_error")(torch.ones(2, 3), empty, values)
    torch.testing.assert_close(loss, torch.tensor(3.0))


def test_settings_may_be_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    assert softsphere.SphericalSoftmaxLoss(eps=numpy.float32(0.5)).loss.eps == 0.5
