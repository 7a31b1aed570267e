"""Outputs that are equal up to rounding are equal on every machine; real differences are kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import softplus

from softsphere import LinearSphericalOptions, SphericalLoss, losses
from softsphere.engines import chunk_sums, chunked, moments
from softsphere.engines.dispatch import linear_statistics
from softsphere.functional import linear_spherical_loss
from softsphere.rounding import above_rounding, error_of_sum, is_rounding, spread_of_equals
from softsphere.stats import Stats

DTYPES = [torch.float32, torch.float64]
EQUAL = softplus(torch.tensor(4.0))  # the Z-loss of equal outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [3, 507, 100_000])
@pytest.mark.parametrize("prior", [False, True])
def test_equal_logits_are_equal_to_the_z_loss(dtype, D, prior):
    criterion = SphericalLoss("z_loss", prior=torch.rand(D) + 0.1 if prior else None)
    for mean in (1.0, -37.3, 1e-9, 4e8, 3e20, 1e-30):
        o = torch.full((2, D), mean, dtype=dtype, requires_grad=True)
        loss = criterion(o, torch.tensor([0, D - 1]))
        torch.testing.assert_close(loss, EQUAL.to(dtype), atol=0, rtol=1e-5)
        assert not torch.autograd.grad(loss, o)[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 508, 100_000])
@pytest.mark.parametrize("mean", [1.0, -37.3, 4e8])
def test_logits_that_differ_in_the_last_digit_are_not(dtype, D, mean):
    """Nothing was summed, so a difference of one digit is a difference: half are above half."""
    o = torch.full((2, D), mean, dtype=dtype)
    o[:, ::2] = torch.nextafter(o[:, ::2], torch.full_like(o[:, ::2], torch.inf))
    loss = SphericalLoss("z_loss", reduction="none")(o.requires_grad_(), torch.tensor([0, 1]))
    want = softplus(4 - torch.tensor([1.0, -1.0], dtype=dtype))
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=0)
    assert torch.autograd.grad(loss.sum(), o)[0].any()


def as_on_another_machine(product, ulps=3.7):
    """The product H xᵀ + x1 with columns that differ by a few eps of the sizes."""

    def changed(H, x, x1, *dtype):
        o, size = product(H, x, x1, *dtype), H.abs() @ x.abs().mT
        size = size if x1 is None else size + x1.abs()
        generator = torch.Generator().manual_seed(o.shape[1])
        noise = torch.rand(o.shape, generator=generator, dtype=o.dtype).to(o.device) - 0.5
        return o + ulps * torch.finfo(o.dtype).eps * noise * size

    return changed


def make_machine_round_differently(monkeypatch):
    """Equal rows give products that are not, and a shift that is some eps away from them."""
    linear, outputs = torch.nn.functional.linear, chunked._outputs
    monkeypatch.setattr(torch.nn.functional, "linear", as_on_another_machine(linear))
    monkeypatch.setattr(chunked, "_outputs", as_on_another_machine(outputs))
    mean_row, shift, over_rows = chunked.mean_row, moments._shift, chunk_sums.over_rows

    def away(x):
        return x * (1 + 4 * torch.finfo(x.dtype).eps)

    def rounded(a, b, dtype, out=None):
        o = over_rows(a, b, dtype, out)
        generator = torch.Generator().manual_seed(o.shape[1])
        noise = torch.rand(o.shape, generator=generator, dtype=o.dtype).to(o.device) - 0.5
        return o * (1 + 3.7 * torch.finfo(o.dtype).eps * noise)

    monkeypatch.setattr(chunked, "mean_row", lambda *args: away(mean_row(*args)))
    monkeypatch.setattr(moments, "_shift", lambda *args: away(shift(*args)))
    monkeypatch.setattr(chunk_sums, "over_rows", rounded)


@pytest.mark.parametrize("sums", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("engine", ["auto", "dense", "chunked", "gram"])
def test_equal_rows_are_equal_to_the_z_loss(engine, prior, dtype, sums, monkeypatch):
    make_machine_round_differently(monkeypatch)
    chunk = None if engine == "dense" else 100
    for seed in range(4):
        torch.manual_seed(seed)
        H = torch.randn(4, 6, dtype=dtype, requires_grad=True)
        W, b = 3 * torch.randn(1, 6, dtype=dtype), torch.randn(1, dtype=dtype)
        loss = linear_spherical_loss(
            H, W.expand(507, 6), torch.tensor([0, 1, 1, 506]), "z_loss", linear_bias=b.expand(507),
            prior=torch.rand(507, dtype=dtype) + 0.1 if prior else None,
            options=LinearSphericalOptions(engine, None, chunk, accumulate_dtype=sums),
        )  # fmt: skip
        torch.testing.assert_close(loss, EQUAL.to(loss.dtype), atol=0, rtol=1e-5)
        assert not torch.autograd.grad(loss, H)[0].any()


@pytest.mark.parametrize("engine", ["auto", "chunked", "gram"])
def test_a_common_part_that_is_subtracted_exactly_does_not_count(engine):
    torch.manual_seed(0)
    W, H = 0.1 * torch.randn(5000, 32), 1e-3 * torch.randn(64, 32)
    W[:, 0], H[:, 0] = 1, 1e4
    o = H[:, 1:].double() @ W[:, 1:].double().mT
    z = (o - o.mean(1, keepdim=True)) / o.std(1, correction=0, keepdim=True)
    loss = linear_spherical_loss(
        H, W, torch.arange(64), "z_loss", reduction="none", options=LinearSphericalOptions(engine)
    )
    torch.testing.assert_close(loss.double(), softplus(4 - z.diagonal()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("engine", ["auto", "dense", "chunked", "gram"])
def test_the_sizes_are_not_those_of_the_target_alone(engine):
    torch.manual_seed(0)
    W, H = 1e-4 * torch.randn(1000, 16), torch.randn(4, 16)
    W[:4, 0], W[:4, 1], H[:, :2] = 1e4, -1e4, 1
    target = torch.arange(4)[:, None]
    options = LinearSphericalOptions(engine)
    x = linear_statistics(H, W, None, target, None, centred=True, options=options)
    o = H.double() @ W.double().mT
    # the four large rows add rounding errors of 1e-3 at most
    want = (o - o.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(x.q.double(), want, rtol=0.2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mass", [float, lambda D: torch.tensor(float(D)).double()])
@pytest.mark.parametrize("D", [3, 507, 100_000, 1_000_000])
def test_sums_of_equal_outputs(dtype, D, mass):
    """s and q with errors of both signs of pairwise sums."""
    error = 0.5 * math.log2(D) * torch.finfo(dtype).eps * torch.tensor([-1.0, 1.0, 1.0, -1.0])
    s = D * 0.1 * (1 + error.double() * torch.tensor([1.0, 1.0, -1.0, -1.0]))
    q = D * 0.01 * (1 + error.double())
    x = Stats(s.to(dtype), q.to(dtype), torch.full((4, 1), 0.11, dtype=dtype), mass(D))
    assert not losses.ZLoss().standardised(x).any()


def test_a_million_outputs_with_a_deviation_of_a_hundredth_of_their_mean():
    torch.manual_seed(0)
    o = 1 + 0.01 * torch.randn(1_000_000)
    x = Stats(o.sum(), (o * o).sum(), o[:1], mass=1e6)
    wide = o.double()
    want = softplus(4 - (wide[:1] - wide.mean()) / wide.std(correction=0)).squeeze()
    torch.testing.assert_close(losses.ZLoss().value(x).double(), want, rtol=0.01, atol=0)


def test_the_bounds_grow_with_terms_and_sizes_and_no_faster():
    assert spread_of_equals(0, torch.float64) == 4 * torch.finfo(torch.float64).eps
    assert spread_of_equals(10_000, torch.float32) == 104 * torch.finfo(torch.float32).eps
    assert error_of_sum(1024, torch.float32) == 14 * torch.finfo(torch.float32).eps
    assert error_of_sum(torch.tensor(1024.0), torch.float32) == error_of_sum(1024, torch.float32)
    assert error_of_sum(0.5, torch.float32) == 4 * torch.finfo(torch.float32).eps
    q, apart = torch.tensor([1.0, 1e-13, torch.nan]), torch.tensor(1e-6)
    kept = above_rounding(q, apart, 10.0)
    assert kept[0] == 1 and kept[1] == 0 and kept[2].isnan()
    assert above_rounding(q, apart * 1e-3, 10.0)[1] == q[1]
    # a million outputs: 1e-6 of their square is rounding in float32, 1e-4 is not
    one = torch.tensor(1.0)
    assert is_rounding(1e-6 * one, one, 1e6) and not is_rounding(1e-4 * one, one, 1e6)
    assert not is_rounding(1e-12 * one.double(), one.double(), 1e6)


def test_a_bound_does_not_overflow():
    """The square of 1e25 is infinite in float32, and no infinite q is below it."""
    q = torch.tensor([torch.inf, 1.0])
    assert above_rounding(q, torch.tensor(1e25), 3.0).tolist() == [torch.inf, 0]
    assert above_rounding(q, torch.tensor(torch.inf), 3.0).tolist() == [torch.inf, 0]
    o = torch.tensor([[1.0, 0.5, torch.finfo(torch.float32).min]])
    x = linear_statistics(
        o, torch.eye(3), None, torch.tensor([[0]]), None, centred=True,
        options=LinearSphericalOptions("dense"),
    )  # fmt: skip
    assert x.q == torch.inf
