"""The factored layer where all rows of W have a large part in common, beside a dense float64 W."""

from __future__ import annotations

import math

import pytest
import torch

from _matrix_units import float32_may_be, float32_rounded_to
from _twin import DenseTwin
from softsphere import FactoredSphericalLoss, losses
from softsphere.optim import FactoredSGD

D, d, m = 600, 8, 8
RATES = {"taylor_softmax": 30.0, "z_loss": 10.0}
EPS = torch.finfo(torch.float32).eps


def layer_with_common_row(
    loss: str, common: float, prior: bool, D: int = D
) -> FactoredSphericalLoss:
    """A float32 layer with a first column of `common`, which its bias leaves 1 of."""
    torch.manual_seed(0)
    weight, bias = 0.1 * torch.randn(D, d), torch.full((D,), 1 - common)
    weight[:, 0] = common
    head = FactoredSphericalLoss(d, D, loss=loss, prior=torch.rand(D) + 0.2 if prior else None)
    head.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    return head


def twin_of(head: FactoredSphericalLoss, **sgd: float) -> DenseTwin:
    dense = head.dense()
    return DenseTwin(dense[:, :-1], dense[:, -1], head.base_measure, **sgd)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    hidden = 0.1 * torch.randn(m, d)
    hidden[:, 0] = 1.0
    return hidden, torch.randint(D, (m,))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize(
    ("common", "momentum"), [(1.0, 0.0), (300.0, 0.0), (1000.0, 0.0), (300.0, 0.9)]
)
@pytest.mark.parametrize("loss", RATES)
def test_a_large_common_row_costs_no_more_digits_than_rounding_the_outputs(
    loss, momentum, common, prior
):
    head, kind = layer_with_common_row(loss, common, prior), losses.get(loss)
    sgd = {"lr": RATES[loss] * (1 - momentum), "momentum": momentum}
    twin, optimizer = twin_of(head, **sgd), FactoredSGD(head.parameters(), **sgd)
    first = twin.W.detach()
    rounding = EPS * (1 + 2 * common)  # of one output in float32
    for _ in range(40):
        hidden, target = batch()
        inputs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        optimizer.zero_grad()
        twin.sgd.zero_grad()
        value, want = head(inputs[0], target), twin.loss(kind, inputs[1], target).mean()
        value.backward()
        want.backward()
        assert float(value.detach() - want.detach()) == pytest.approx(0, abs=50 * rounding)
        error = (inputs[0].grad - inputs[1].grad).norm() / inputs[1].grad.norm()
        assert error < 500 * rounding
        norms = head.weight.grad.norm(), twin.parameter.grad.norm().float()
        torch.testing.assert_close(*norms, rtol=50 * rounding, atol=0)
        optimizer.step()
        twin.sgd.step()
    moved = (twin.W.detach() - first).norm()
    assert (head.dense() - twin.W.detach()).norm() / moved < 50 * rounding
    assert head.health().gram_drift < 1e-4


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("common", [1.0, 300.0, 1000.0])
def test_probabilities_sum_to_one_beside_a_large_common_row(common, prior):
    head = layer_with_common_row("taylor_softmax", common, prior, many := 20_000)
    # of given classes, so that the normaliser is that of the kept Gram matrix
    total = head.log_prob(batch()[0], torch.arange(many)).double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones(m).double(), rtol=0, atol=50 * EPS * common)


def test_equal_rows_give_equal_outputs():
    torch.manual_seed(0)
    head = FactoredSphericalLoss(d, D, loss="z_loss")
    row = 300 * torch.randn(1, d)
    head.load_state_dict({"weight": row.repeat(D, 1), "bias": torch.full((D,), 7.0)})
    hidden = torch.randn(m, d, requires_grad=True)
    value = head(hidden, torch.randint(D, (m,)))
    assert float(value.detach()) == pytest.approx(math.log1p(math.exp(4.0)))
    value.backward()
    assert not hidden.grad.any()


def test_a_common_row_does_not_hide_small_differences():
    torch.manual_seed(0)
    head = FactoredSphericalLoss(d, D, loss="z_loss", bias=False)
    W, hidden = 0.1 * torch.randn(D, d), 1e-3 * torch.randn(m, d)
    W[:, 0], hidden[:, 0] = 1, 1e4
    head.load_state_dict({"weight": W})
    o, target = hidden[:, 1:].double() @ W[:, 1:].double().mT, torch.randint(D, (m,))
    z = (o - o.mean(1, keepdim=True)) / o.std(1, correction=0, keepdim=True)
    want = torch.nn.functional.softplus(4 - z.gather(1, target[:, None])).mean()
    torch.testing.assert_close(head(hidden, target).double(), want, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("precision", "bits"), [("high", 10), ("medium", 7)])
def test_columns_that_cancel_where_float32_products_are_rounded(monkeypatch, precision, bits):
    """q is as good as from outputs whose factors are rounded; G in one product would lose it."""
    torch.manual_seed(0)
    weight, hidden, target = 0.1 * torch.randn(D, d), 0.1 * torch.randn(m, d), torch.arange(m)
    weight[:, 0], hidden[:, 0] = torch.randn(D), 1.3
    head = FactoredSphericalLoss(d, D, loss="squared_error")
    head.load_state_dict({"weight": weight, "bias": -1.3 * weight[:, 0]}, strict=False)
    W, b = head.dense().split([d, 1], 1)

    def loss(o):
        return (o.square().sum(1) - 2 * o.gather(1, target.unsqueeze(1)).squeeze(1) + 1).mean()

    want = loss(hidden.double() @ W.double().mT + b.double().mT)
    float32_may_be(monkeypatch, precision)
    with float32_rounded_to(bits):
        ours, theirs = head(hidden, target), loss(hidden @ W.mT + b.mT)
    terms = 2 * (1.3 * weight[:, 0]).square().sum()
    assert (ours - want).abs() <= 2 * (theirs - want).abs() + 2.0**-16 * terms
