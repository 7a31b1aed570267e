"""The squared error of outputs that meet large targets keeps its digits."""

from __future__ import annotations

import pytest
import torch

from _bytes import Bytes
from softsphere import FactoredSphericalLoss, LinearSphericalLoss, LinearSphericalOptions
from softsphere.functional import linear_spherical_loss, spherical_loss
from softsphere.losses import SquaredError

D, m = 40, 16
# A mask and a prior give π = 0, and other numbers than 1.
MASK = torch.arange(D) % 5 != 0
PRIOR = torch.rand(D, generator=torch.Generator().manual_seed(0)) + 0.5
# Every class is a target; some in two places, whose values add up.
TARGET = torch.stack([torch.randperm(D) for _ in range(m)])
GIVEN = {
    "nothing": {},
    "prior": {"prior": PRIOR},
    "mask": {"mask": MASK},
    "prior and mask": {"prior": PRIOR, "mask": MASK},
}


def explicitly(o, y, alpha, prior=None, mask=None):
    """Σ_k w_k π_k (o_k − y_k)² in float64."""
    kept = torch.ones(D, dtype=torch.bool) if mask is None else mask
    pi = torch.ones(D, dtype=torch.float64) if prior is None else prior.double()
    pi = torch.where(kept, pi, 0.0)
    pi = pi * kept.sum() / pi.sum()
    w = torch.where(y == 0, alpha, 1.0)
    return (w * pi * (o.double() - y.double()).square()).sum(1).mean()


def sparse(y, mask=None):
    """Targets (m, 2 D) and values of a dense y, each in two halves."""
    target = TARGET if mask is None else torch.where(mask[TARGET], TARGET, -1)
    value = torch.where(target < 0, 0.0, y.gather(1, TARGET))
    return torch.cat([target, target], 1), torch.cat([value / 4, 3 * value / 4], 1)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_logits(scale, alpha, given):
    torch.manual_seed(0)
    given, loss = GIVEN[given], SquaredError(alpha)
    y = scale * (3 + torch.randn(m, D))
    y = y if given.get("mask") is None else torch.where(given["mask"], y, 0.0)
    o = y + torch.randn(m, D) / 10
    want = explicitly(o, y, alpha, **given).float()
    values = [spherical_loss(o, y, loss, **given)]
    target, value = sparse(y, given.get("mask"))
    values.append(spherical_loss(o, target, loss, target_values=value, **given))
    for found in values:
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


@pytest.mark.once("lost digits are noticed on a CPU alone")
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("engine", ["auto", "dense"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_linear_layers(scale, engine, alpha, given):
    torch.manual_seed(0)
    given, d = GIVEN[given], 24
    H, W, b = torch.randn(m, d), scale * torch.randn(D, d), scale * torch.randn(D)
    o = torch.nn.functional.linear(H.double(), W.double(), b.double())
    y = (o + torch.randn(m, D) / 10).float()
    y = y if given.get("mask") is None else torch.where(given["mask"], y, 0.0)
    target, value = sparse(y, given.get("mask"))
    found = linear_spherical_loss(
        H,
        W,
        target,
        SquaredError(alpha),
        linear_bias=b,
        target_values=value,
        options=LinearSphericalOptions(engine),
        **given,
    )
    assert found.dtype == torch.float32
    want = explicitly(o, y, alpha, **given).float()
    # float32 products alone leave an error of some eps of the outputs
    torch.testing.assert_close(found, want, rtol=2e-2, atol=0)


@pytest.mark.once("lost digits are noticed on a CPU alone")
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_class_indices_that_are_met(noise):
    """The outputs are nearly those of one class, with a bias in place of a weight."""
    torch.manual_seed(0)
    b = torch.zeros(D)
    b[0] = 1
    b += noise * torch.randn(D)
    want = (b.double() - torch.eye(D, dtype=torch.float64)[0]).square().sum().float()
    target, H, W = torch.zeros(m, dtype=torch.long), torch.randn(m, 3), torch.zeros(D, 3)
    values = [spherical_loss(b.expand(m, D), target, "squared_error")]
    for engine in ("auto", "dense"):
        options = LinearSphericalOptions(engine)
        values.append(
            linear_spherical_loss(
                H, W, target, "squared_error", linear_bias=b, options=options, reduction="mean"
            )
        )
    for found in values:
        torch.testing.assert_close(found, want, rtol=1e-4, atol=0)


def met(layer):
    """Rows of a layer and targets that are nearly its outputs."""
    torch.manual_seed(1)
    H = torch.randn(m, layer.in_features)
    with torch.no_grad():
        W = layer.dense() if isinstance(layer, FactoredSphericalLoss) else layer.weight
        o = H @ W[:, : layer.in_features].mT
    return H, TARGET, o.gather(1, TARGET) * (1 + 1e-5)


@pytest.mark.once("lost digits are noticed on a CPU alone")
@pytest.mark.parametrize("engine", ["gram", "chunked"])
def test_a_named_engine_says_that_digits_are_lost(engine):
    layer = LinearSphericalLoss(
        24, D, "squared_error", bias=False, options=LinearSphericalOptions(engine)
    )
    with pytest.warns(UserWarning, match=r"lost its digits.*float64"):
        layer(*met(layer))


@pytest.mark.once("lost digits are noticed on a CPU alone")
def test_a_factored_layer_says_that_digits_are_lost():
    layer = FactoredSphericalLoss(24, D, "squared_error", bias=False)
    with pytest.warns(UserWarning, match=r"lost its digits.*float64"):
        layer(*met(layer))


@pytest.mark.once("lost digits are noticed on a CPU alone")
def test_accumulation_refuses_squares_that_have_lost_their_digits():
    layer = LinearSphericalLoss(24, D, "squared_error", bias=False)
    H, target, y = met(layer)
    with layer.accumulate(), pytest.raises(RuntimeError, match=r"lost its digits.*float64"):
        layer(H, target, y)
    with layer.accumulate():
        layer(H, target, 2 * y).backward()
    assert layer.weight.grad is not None


@pytest.mark.once("values are looked at on a CPU alone")
def test_an_infinite_bias_is_named():
    b = torch.zeros(D)
    b[3] = -torch.inf
    with pytest.raises(ValueError, match="linear_bias must be finite"):
        linear_spherical_loss(
            torch.randn(m, 4),
            torch.randn(D, 4),
            TARGET,
            "squared_error",
            linear_bias=b,
            target_values=torch.randn(m, D),
            options=LinearSphericalOptions("dense"),
        )


def test_target_values_on_logits_take_one_copy_of_them():
    o = torch.randn(512, 4096)
    target, y = torch.randint(4096, (512, 4)), torch.randn(512, 4)
    kept = o.clone().requires_grad_()
    with Bytes(kept, target, y) as meter:
        spherical_loss(kept, target, "squared_error", target_values=y).backward()
    # the residuals, the gradient, and a part of the squares
    assert meter.most < 3.5 * o.untyped_storage().nbytes()
