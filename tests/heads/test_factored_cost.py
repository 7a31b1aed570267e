"""What a step of a factored layer costs, and how exact many of them are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from _factored import NAMES
from softsphere import (
    FactoredSphericalLoss,
    SphericalLoss,
)
from softsphere.matrix import step
from softsphere.optim import FactoredSGD


def flops(monkeypatch, num_classes, m, name, **sgd):
    """The FLOPs of a step without the repairs, which are rare and tested below.

    On a GPU a step that follows others without a repair may be left undone and taken again.
    """
    head = FactoredSphericalLoss(16, num_classes, name)
    optimizer = FactoredSGD(head.parameters(), lr=0.01, **sgd)
    if head.weight.device.type == "cpu":
        monkeypatch.setattr(head.matrix.watch, "is_due", lambda *_: False)
    hidden, target = torch.randn(m, 16, requires_grad=True), torch.randint(num_classes, (m,))
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            optimizer.zero_grad()
            head(hidden, target).backward()
            optimizer.step()
    return counter.get_total_flops()


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_nothing_in_classes(name, m, sgd, monkeypatch):
    # How many products the inverse takes depends on the numbers; test_inverse.py bounds them.
    monkeypatch.setattr(step, "by_few_products", lambda K, share: None)
    few, many = (flops(monkeypatch, D, m, name, **sgd) for D in (100, 50_000))
    assert few == many > 0


@pytest.mark.once("operations of a CPU are counted")
@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
def test_mending_costs_nothing_in_classes(sgd):
    """Sixty steps of the loss that wears U out fastest, with all repairs counted."""
    spent = []
    for num_classes in (2_000, 100_000):
        torch.manual_seed(0)
        head = FactoredSphericalLoss(16, num_classes, "squared_error", dtype=torch.float64)
        optimizer = FactoredSGD(head.parameters(), lr=0.05, **sgd)
        hidden = torch.randn(60, 8, 16, dtype=torch.float64, requires_grad=True)
        head.health()  # Q is made
        with FlopCounterMode(display=False) as counter:
            for rows in hidden:
                optimizer.zero_grad()
                head(rows, torch.randint(2_000, (8,))).backward()
                optimizer.step()
        assert head.health(0).renewed > 1
        spent.append(counter.get_total_flops())
    assert spent[1] == pytest.approx(spent[0], rel=0.05)


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if (
            isinstance(result, torch.Tensor)
            and result.untyped_storage().size()
            and not (name.endswith("_.default") or func.is_view)
        ):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_has_a_class_dimension():
    classes, m = 20_000, 8
    head = FactoredSphericalLoss(16, classes)
    optimizer = FactoredSGD(head.parameters(), lr=0.01)
    hidden, target = torch.randn(m, 16, requires_grad=True), torch.randint(classes, (m,))
    head.health()  # Q is made
    with Largest() as largest:
        head(hidden, target).backward()
        optimizer.step()
    assert 0 < largest.numel < classes / 10


# Rates at which the losses train. That of the squared error is barely stable.
RATES = {
    "squared_error": 0.05,
    "spherical_softmax": 0.5,
    "taylor_softmax": 0.5,
    "z_loss": 0.5,
    "bohning_bound": 0.05,
    "bouchard_bound": 0.02,
}


WITH_MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("name", "sgd"),
    [
        ("squared_error", {}),
        ("spherical_softmax", {}),
        ("taylor_softmax", {}),
        ("z_loss", WITH_MOMENTUM),
        ("bohning_bound", WITH_MOMENTUM),
    ],
)
def test_float32_stays_as_near_as_the_dense_layer_over_many_steps(name, sgd):
    """These are a few hundred steps. The slow tests below take ten thousand with each loss."""
    runs = Runs(name, sgd)
    runs.take(300)
    factored, dense = runs.errors()
    assert factored <= 5 * dense


@pytest.mark.slow
@pytest.mark.parametrize("sgd", [{}, WITH_MOMENTUM], ids=["plain", "momentum"])
@pytest.mark.parametrize("name", sorted(RATES.keys() - {"spherical_softmax"}))
def test_float32_stays_as_near_as_the_dense_layer_over_10_000_steps(name, sgd):
    """Not with spherical softmax; see the next test."""
    runs = Runs(name, sgd)
    runs.take(10_000)
    factored, dense = runs.errors()
    assert factored <= 5 * dense


@pytest.mark.slow
@pytest.mark.parametrize("sgd", [{}, WITH_MOMENTUM], ids=["plain", "momentum"])
@pytest.mark.parametrize("name", RATES)
def test_factors_of_any_age_are_as_near_as_the_dense_layer(name, sgd):
    """Ten thousand steps, in each hundred of which the dense runs begin at what is factored.

    Without that, the error of spherical softmax would say little about the factors. Its gradient
    with respect to an output near zero is in proportion to the output, so that it multiplies a row
    that has come near to zero together with its error. After thousands of steps the last digit of
    a small row has become any digit of a large one.
    """
    runs = Runs(name, sgd)
    errors = []
    for _ in range(100):
        runs.take(100)
        errors.append(runs.errors())
        runs.begin_again()
    factored, dense = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert factored <= 5 * dense


class Runs:
    """The same steps factored in float32, and dense in float64 and in float32."""

    def __init__(self, name, sgd, classes=200, width=16):
        torch.manual_seed(0)
        self.head = FactoredSphericalLoss(width, classes, name, bias=False)
        self.criterion = SphericalLoss(name)
        sgd = {**sgd, "lr": RATES[name] * (1 - sgd.get("momentum", 0.0))}
        self.sgd = FactoredSGD(self.head.parameters(), **sgd)
        W = self.head.dense()
        self.dense = [nn.Parameter(W.to(dtype)) for dtype in (torch.float64, torch.float32)]
        self.others = [torch.optim.SGD([W], **sgd) for W in self.dense]
        self.scale = torch.logspace(0.3, -0.7, width)
        self.mixing = torch.randn(width, classes) / width**0.5

    def take(self, steps, m=8):
        for _ in range(steps):
            hidden = torch.randn(m, len(self.scale)) * self.scale
            target = (hidden @ self.mixing).argmax(1)
            optimizers = [self.sgd, *self.others]
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.head(hidden, target).backward()
            for W in self.dense:
                self.criterion(hidden.to(W.dtype) @ W.mT, target).backward()
            for optimizer in optimizers:
                optimizer.step()

    def errors(self):
        """The relative errors of W, factored and dense in float32."""
        exact, plain = (W.detach() for W in self.dense)
        return [float((W - exact).norm() / exact.norm()) for W in (self.head.dense(), plain)]

    @torch.no_grad()
    def begin_again(self):
        """Sets the dense runs to W and the momentum of the factored one."""
        momentum = self.sgd.state[self.head.weight].get("momentum_buffer")
        for W, optimizer in zip(self.dense, self.others, strict=True):
            W.copy_(self.head.dense())
            if momentum is not None:
                optimizer.state[W]["momentum_buffer"].copy_(momentum.to_dense())
