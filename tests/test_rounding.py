"""What is equal but for rounding is equal, on every machine, and what differs by more is kept."""

from __future__ import annotations

import pytest
import torch

from _engines import ENGINES
from softsphere import LinearSphericalOptions, SphericalLoss, losses
from softsphere.functional import linear_spherical_loss
from softsphere.rounding import above_rounding, is_rounding, spread_of_equals
from softsphere.stats import Stats

DTYPES = [torch.float32, torch.float64]
EQUAL = torch.nn.functional.softplus(torch.tensor(4.0))  # the Z-loss of equal outputs


def apart(like, ulps, seed=0):
    """Factors that are 1 but for at most `ulps` machine epsilons between any two."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5
    noise.view(-1)[0], noise.view(-1)[-1] = -0.5, 0.5
    return (1 + ulps * torch.finfo(like.dtype).eps * noise).to(like.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3, 507, 100_000])
@pytest.mark.parametrize("prior", [False, True])
def test_logits_that_differ_by_rounding_are_equal_to_the_z_loss(dtype, D, prior):
    criterion = SphericalLoss("z_loss", prior=torch.rand(D) + 0.1 if prior else None)
    for seed, mean in enumerate((1.0, -37.3, 1e-9, 4e8)):
        o = torch.full((2, D), mean, dtype=dtype)
        o = (o * apart(o, 3.7, seed)).requires_grad_()
        loss = criterion(o, torch.tensor([0, D - 1]))
        torch.testing.assert_close(loss, EQUAL.to(dtype), atol=0, rtol=1e-5)
        assert not torch.autograd.grad(loss, o)[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3, 507, 100_000])
def test_logits_that_differ_by_more_are_not(dtype, D):
    o = torch.full((2, D), -37.3, dtype=dtype)
    o = (o * apart(o, 64.0)).requires_grad_()
    mu = o.double().mean(1, keepdim=True)
    sigma = (o.double() - mu).square().mean(1).sqrt()
    want = torch.nn.functional.softplus(4 - (o.double() - mu)[:, 0] / sigma)
    loss = SphericalLoss("z_loss", reduction="none")(o, torch.tensor([0, 0]))
    # the mean is known to the last digit of an output, a few hundredths of their spread
    torch.testing.assert_close(loss.double(), want, rtol=0.02, atol=0)
    assert torch.autograd.grad(loss.sum(), o)[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_differ_by_rounding_are_equal_to_the_z_loss(engine, prior, dtype):
    for seed in range(4):
        torch.manual_seed(seed)
        H = torch.randn(4, 6, dtype=dtype, requires_grad=True)
        W, b = 3 * torch.randn(1, 6, dtype=dtype), torch.randn(1, dtype=dtype)
        W = W.expand(507, 6) * apart(torch.empty(507, 1, dtype=dtype), 1.8, seed)
        b = b.expand(507) * apart(torch.empty(507, dtype=dtype), 1.8, seed)
        loss = linear_spherical_loss(
            H, W, torch.tensor([0, 1, 1, 506]), "z_loss", linear_bias=b,
            prior=torch.rand(507, dtype=dtype) + 0.1 if prior else None,
            options=LinearSphericalOptions(engine=engine),
        )  # fmt: skip
        torch.testing.assert_close(loss, EQUAL.to(dtype), atol=0, rtol=1e-5)
        assert not torch.autograd.grad(loss, H)[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mass", [float, lambda D: torch.tensor(float(D)).double()])
@pytest.mark.parametrize("D", [3, 507, 100_000, 1_000_000])
def test_sums_of_equal_outputs(dtype, D, mass):
    """s and q with errors of both signs that grow with the root of the number of terms."""
    error = 0.5 * D**0.5 * torch.finfo(dtype).eps * torch.tensor([-1.0, 1.0, 1.0, -1.0])
    s = D * 0.1 * (1 + error.double() * torch.tensor([1.0, 1.0, -1.0, -1.0]))
    q = D * 0.01 * (1 + error.double())
    x = Stats(s.to(dtype), q.to(dtype), torch.full((4, 1), 0.11, dtype=dtype), mass(D))
    assert not losses.ZLoss().standardised(x).any()


def test_the_bounds_grow_with_terms_and_sizes_and_no_faster():
    assert spread_of_equals(0, torch.float64) == 4 * torch.finfo(torch.float64).eps
    assert spread_of_equals(10_000, torch.float32) == 104 * torch.finfo(torch.float32).eps
    q, size = torch.tensor([1.0, 1e-13, torch.nan]), torch.tensor([1.0, 1.0, 1.0])
    kept = above_rounding(q, size, 10.0)
    assert kept[0] == 1 and kept[1] == 0 and kept[2].isnan()
    assert above_rounding(q, size * 1e-3, 10.0)[1] == q[1]
    assert above_rounding(torch.tensor(1e-8), torch.tensor(1.0), 10.0, terms=0) > 0
    assert above_rounding(torch.tensor(1e-8), torch.tensor(1.0), 10.0, terms=1_000_000) == 0
    # a million outputs: 1e-4 of their square is rounding in float32, 1e-10 is none in float64
    one = torch.tensor(1.0)
    assert is_rounding(1e-4 * one, one, 1e6) and not is_rounding(1e-3 * one, one, 1e6)
    assert not is_rounding(1e-10 * one.double(), one.double(), 1e6)
