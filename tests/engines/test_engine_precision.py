"""The digits of statistics and gradients by every engine: sums, common parts, half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from _devices import autocasts
from _engines import ENGINES, layer, with_gradients
from softsphere import LinearSphericalOptions
from softsphere.engines.dispatch import linear_statistics
from softsphere.functional import linear_spherical_loss, spherical_loss


@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_in_float64_of_float32(engine):
    H, W, b = layer(9, 123, 6, torch.float32)
    target = torch.randint(123, (9, 1))
    options = LinearSphericalOptions(engine=engine, accumulate_dtype=torch.float64)
    x = linear_statistics(H, W, b, target, None, centred=True, options=options)
    exact = linear_statistics(
        *(y.double() for y in (H, W, b)), target, None, centred=True, options=options
    )
    assert x.q.dtype == torch.float64
    # the outputs of the dense engine have been rounded already
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if engine == "dense" else {"rtol": 1e-12, "atol": 1e-12}
    )
    torch.testing.assert_close(x.q, exact.q, **tolerance)
    torch.testing.assert_close(x.c, exact.c, **tolerance)
    x.q.sum().backward()
    assert W.grad.dtype == torch.float32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["z_loss", "bohning_bound"])
def test_a_large_common_part_costs_no_digits(name, engine):
    """float32 outputs around 1000, where s and q apart would lose all that makes the loss."""
    H, W, b = layer(9, 507, 6, torch.float32)
    target = torch.randint(507, (9,))
    with torch.no_grad():
        b += 1000
    call = {"linear_bias": b, "options": ENGINES[engine]}
    got = with_gradients(linear_spherical_loss(H, W, target, name, **call), H, W)
    H, W, b = (x.detach().double().requires_grad_() for x in (H, W, b))
    call["linear_bias"] = b
    want = with_gradients(linear_spherical_loss(H, W, target, name, **call), H, W)
    for x, y in zip(got, want, strict=True):
        # a float32 near 1000 is known to 3e-5
        torch.testing.assert_close(x.double(), y, rtol=5e-4, atol=5e-4 * y.abs().max().item())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_sees_no_shift_sums_to_nothing(engine):
    """Σ_k ∂W_k = 0, also where float32 rows have 1000 times more in common than apart."""
    torch.manual_seed(0)
    H, b = torch.randn(9, 6), torch.randn(507, requires_grad=True)
    W = (torch.randn(507, 6) + 1000 * torch.randn(6)).requires_grad_()
    loss = linear_spherical_loss(
        H, W, torch.randint(507, (9,)), "bohning_bound", linear_bias=b, options=ENGINES[engine]
    )
    for grad in torch.autograd.grad(loss, [W, b]):
        assert grad.double().sum(0).norm() < 1e-6 * grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_equal_outputs_are_equal_to_the_z_loss(engine, prior, dtype):
    for seed in range(4):
        torch.manual_seed(seed)
        H = torch.randn(4, 6, dtype=dtype, requires_grad=True)
        W = 3 * torch.randn(1, 6, dtype=dtype).expand(507, 6)
        b = torch.randn(1, dtype=dtype).expand(507)
        loss = linear_spherical_loss(
            H, W, torch.tensor([0, 1, 1, 506]), "z_loss", linear_bias=b,
            prior=torch.rand(507, dtype=dtype) + 0.1 if prior else None, options=ENGINES[engine],
        )  # fmt: skip
        want = spherical_loss(torch.zeros(1, 507, dtype=dtype), torch.tensor([0]), "z_loss")
        torch.testing.assert_close(loss, want)
        assert not torch.autograd.grad(loss, H)[0].any()


def test_sums_over_many_chunks_lose_nothing():
    torch.manual_seed(0)
    H, W = torch.rand(3, 4), torch.rand(20_000, 4)
    target, options = torch.zeros(3, 1).long(), LinearSphericalOptions("gram", class_chunk=1)
    x = linear_statistics(H, W, None, target, None, centred=False, options=options)
    o = H.double() @ W.double().T
    torch.testing.assert_close(x.q.double(), o.square().sum(1), rtol=5e-7, atol=0)
    torch.testing.assert_close(x.s.double(), o.sum(1), rtol=5e-7, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sum_of_squares_is_not_negative_where_it_is_all_rounding(engine):
    torch.manual_seed(0)
    u, H = torch.randn(16), torch.randn(200, 16)
    W = torch.outer(torch.randn(507), u)
    H = H - torch.outer(H @ u, u / u.dot(u))  # all outputs are zero, to rounding
    target = torch.zeros(200, 1, dtype=torch.long)
    x = linear_statistics(H, W, None, target, None, centred=False, options=ENGINES[engine])
    assert (x.q >= 0).all() and x.q.max() < 1e-2


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_is_that_of_the_linear_layer(engine, dtype, device):
    H, W, b = layer(9, 123, 6, torch.float32)
    target = torch.randint(123, (9,))
    with torch.autocast(autocasts(device), dtype):
        got = linear_spherical_loss(
            H, W, target, "taylor_softmax", linear_bias=b, options=ENGINES[engine]
        )
        want = spherical_loss(F.linear(H, W, b), target, "taylor_softmax")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)
    H2, W2, b2 = (x.detach().to(dtype).float().requires_grad_() for x in (H, W, b))
    exact = linear_spherical_loss(
        H2, W2, target, "taylor_softmax", linear_bias=b2, options=ENGINES[engine]
    )
    # the rounded weight is what is used, and nothing but it is rounded
    torch.testing.assert_close(got, exact, rtol=2e-3 if engine == "dense" else 1e-6, atol=0)
    with torch.autocast(autocasts(device), dtype):
        grads = torch.autograd.grad(got, [H, W, b])
    wanted = torch.autograd.grad(exact, [H2, W2, b2])
    for x, y in zip(grads, wanted, strict=True):
        assert x.dtype == torch.float32
        scale = y.abs().max().item()
        torch.testing.assert_close(x, y, rtol=0, atol=2 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_leaves_float64_alone(engine, device):
    H, W, b = layer(5, 123, 4)
    target, call = torch.randint(123, (5,)), {"linear_bias": b, "options": ENGINES[engine]}
    want = linear_spherical_loss(H, W, target, "taylor_softmax", **call)
    with torch.autocast(autocasts(device), torch.bfloat16):
        got = linear_spherical_loss(H, W, target, "taylor_softmax", **call)
    assert got.dtype == torch.float64 and torch.equal(got, want)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "dense"])
@pytest.mark.parametrize("case", ["plain", "prior", "repeated", "sparse"])
@pytest.mark.parametrize("name", ["taylor_softmax", "z_loss", "squared_error"])
def test_bfloat16_is_no_worse_than_on_logits(name, case, engine):
    torch.manual_seed(0)
    H, W, b = layer(63, 507, 32, torch.bfloat16)
    target = torch.randint(2 if case == "repeated" else 507, (63,))
    prior, values = torch.rand(507) + 0.2 if case == "prior" else None, None
    if case == "sparse":
        target, values = torch.randint(507, (63, 3)), torch.rand(63, 3)

    def run(which, inputs):
        loss = linear_spherical_loss(
            *inputs[:2], target, name, linear_bias=inputs[2], prior=prior, reduction="none",
            target_values=values, options=ENGINES[which],
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss.mean(), inputs)]

    exact = run("dense", [x.detach().double().requires_grad_() for x in (H, W, b)])
    dense, ours = run("dense", [H, W, b]), run(engine, [H, W, b])
    for x, y, z in zip(ours, dense, exact, strict=True):
        assert x.dtype == torch.bfloat16
        mine, theirs = ((g.double() - z).norm() / z.norm() for g in (x, y))
        assert mine <= theirs + 1e-3
