"""Products of half-precision factors, and the engines that multiply them as they are."""

from __future__ import annotations

import pytest
import torch

from _engines import SPHERICAL, layer, with_gradients
from _matrix_units import HALVES, as_on_a_gpu, needs_triton
from softsphere import LinearSphericalLoss, LinearSphericalOptions, half_products
from softsphere.engines import moment_gradients, moments, products
from softsphere.functional import linear_spherical_loss


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# Of a loss the kernels know only whether it sees a shift. Interpreted, they take long.
INTERPRETED = [
    (name, given)
    for name in ("taylor_softmax", "bohning_bound")
    for given in ("nothing", "bias and prior")
]
# An engine, and whether kernels of its own make the passes over rows.
COMPUTED = [("gram", False), ("gram", True), ("chunked", False)]
LOW_PRECISION = [
    pytest.param(
        *(name, given, engine, kernels),
        marks=[pytest.mark.slow] if kernels and (name, given) not in INTERPRETED else [],
    )
    for engine, kernels in COMPUTED
    for given in ("nothing", "bias", "prior", "bias and prior")
    for name in SPHERICAL
]


@needs_triton
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("name", "given", "engine", "kernels"), LOW_PRECISION)
def test_low_precision_factors_multiplied_as_they_are(
    monkeypatch, name, given, engine, dtype, kernels
):
    """What a GPU does gives what float32 copies give, to the rounding of the results."""
    H, W, b = layer(63, 507, 32, dtype, "bias" in given)
    prior = torch.rand(507) + 0.1 if "prior" in given else None
    target, options = torch.randint(507, (63,)), LinearSphericalOptions(engine, class_chunk=100)

    def run(H, W, b):
        loss = linear_spherical_loss(
            H,
            W,
            target,
            SPHERICAL[name],
            linear_bias=b,
            prior=prior,
            options=options,
            reduction="sum",
        )
        return with_gradients(loss, H, W, b)

    exact = [None if x is None else x.detach().double().requires_grad_() for x in (H, W, b)]
    plain, want = run(H, W, b), run(*exact)
    used = as_on_a_gpu(monkeypatch, kernels=kernels)
    for mine, copied, x in zip(run(H, W, b), plain, want, strict=True):
        assert error(mine, x) <= error(copied, x) + torch.finfo(dtype).eps
    # the chunked engine takes the mean row off before, which leaves more digits than W has
    assert (dtype in used) == (engine == "gram" or not SPHERICAL[name].shift_invariant)


def test_a_bfloat16_weight_is_read_whole_and_never_copied(monkeypatch):
    """One product gives the gradient of W, but for the rows of the targets.

    A chunk has 2²⁷ numbers.
    """
    used = as_on_a_gpu(monkeypatch)
    head = LinearSphericalLoss(32, 4000, bias=False, dtype=torch.bfloat16)
    head.options = LinearSphericalOptions("gram")
    made = []
    for module in (moments, moment_gradients):
        monkeypatch.setattr(module, "chunk_room", lambda *args: made.append(args))
    head(torch.randn(9, 32, dtype=torch.bfloat16), torch.randint(4000, (9,))).backward()
    assert not made
    # sums of columns, Q, two parts of H Q, two of A, v, two parts of the rows of the targets; the
    # gradient of W is an addmm
    assert used == [torch.bfloat16] * 9


@pytest.mark.parametrize("m", [0, 1, 7, 8, 20])
def test_rows_that_are_multiplied_in_pieces(m, monkeypatch):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(moment_gradients, "_FEWEST", 7)
    monkeypatch.setattr(moment_gradients, "_AT_ONCE", 1)
    sizes, parts = [], moment_gradients.parts
    monkeypatch.setattr(
        moment_gradients, "parts", lambda H, *given: sizes.append(len(H)) or parts(H, *given)
    )
    H, gq = torch.randn(m, 5).bfloat16(), torch.rand(m)
    found = moment_gradients._of_rows(H, gq, torch.float32)
    exact = (H.double() * gq.double().unsqueeze(1)).mT @ H.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    assert sizes == {0: [0], 1: [1], 7: [7], 8: [4, 4], 20: [7, 7, 6]}[m]


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rounding_to_float16_neither_vanishes_nor_overflows(size):
    A = size * torch.rand(4, 4)
    low, scale = half_products.rounded(A, torch.float16)
    torch.testing.assert_close(low.float() * scale, A, rtol=1e-3, atol=1e-6 * size)
    low, scale = half_products.rounded(torch.zeros(2, 2), torch.float16)
    assert not (low.float() * scale).any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_two_parts_have_twice_the_digits(dtype, size):
    A = size * torch.randn(50, 50)
    high, low, scale = half_products.in_parts(A, dtype)
    eps = torch.finfo(dtype).eps
    both = scale * (high.float() + eps * low.float())
    assert (both - A).abs().max() <= eps**2 * A.abs().max()
    assert error(scale * high.float(), A) > eps**2


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
# the smallest numbers over the largest, as powers of ten
@pytest.mark.parametrize("spread", [0, 6, 20])
@pytest.mark.parametrize("terms", [3, 512, 513, 4000])
def test_products_by_float16_are_as_accurate_as_those_of_float32(monkeypatch, terms, spread, size):
    monkeypatch.setattr(half_products, "_RUNS", 3)
    factors = 10 ** (-spread * torch.rand(terms))
    a, b = size * torch.randn(40, terms) * factors, torch.randn(terms, 30) * factors.unsqueeze(1)
    exact = a.double() @ b.double()
    # 22 bits where float32 has 24, and sums that a GPU may cut off
    most = 4 * error(a @ b, exact) + 2.0**-20
    assert error(half_products.by_float16(a, b), exact) < most
    out = torch.full_like(exact, torch.nan, dtype=torch.float32)
    assert half_products.by_float16(a, b, out) is out
    assert error(out, exact) < most


def test_small_rows_and_columns_of_products_by_float16_have_as_many_digits():
    """Rows of U are many powers of ten shorter than others, and worth as much."""
    sizes = 2.0 ** torch.linspace(0, -60, 40)
    a, b = torch.randn(40, 300) * sizes.unsqueeze(1), torch.randn(300, 40) * sizes
    exact, scale = a.double() @ b.double(), torch.outer(sizes, sizes).double()
    found = half_products.by_float16(a, b).double()
    assert error(found / scale, exact / scale) < 4 * error((a @ b) / scale, exact / scale) + 2**-20
    assert ((found - exact) / scale).abs().max() < 1e-4


def test_scales_of_products_by_float16_may_be_far_apart():
    # the product of the scales overflows
    a, b = torch.tensor([[1e30, 0.0], [1e-10, 1e-9]]), torch.tensor([[0.0], [1e20]])
    torch.testing.assert_close(half_products.by_float16(a, b), a @ b, rtol=1e-6, atol=0)
    zero, empty = torch.zeros(3, 4), torch.zeros(3, 0)
    assert not half_products.by_float16(zero, zero.mT).any()
    assert half_products.by_float16(empty, empty.mT).shape == (3, 3)
    assert not half_products.by_float16(empty, empty.mT).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_products_by_float16_of_what_is_not_finite_are_not(bad):
    a, b = torch.ones(3, 4), torch.ones(4, 2)
    a[1, 2] = bad
    assert not half_products.by_float16(a, b)[1].isfinite().any()
    assert not half_products.by_float16(b.mT, a.mT)[:, 1].isfinite().any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_sums_and_products_keep_the_digits_of_float32(monkeypatch, dtype, size):
    H, S, a = torch.randn(70, 30).to(dtype), size * torch.randn(30, 20), size * torch.randn(70)
    exact = H.double()
    as_on_a_gpu(monkeypatch)
    tolerance = torch.finfo(dtype).eps ** 2 + 1e-6
    assert error(products.times(H, S), exact @ S.double()) < tolerance
    assert error(products.weighted_sum(a, H), a.double() @ exact) < tolerance
    assert error(products.column_sums(H, torch.float32), exact.sum(0)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [7, 32, 33, 100])
def test_sums_over_many_rows_are_made_of_short_ones(monkeypatch, dtype, rows):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(half_products, "_RUNS", 2)
    lengths, multiply = [], half_products.product
    monkeypatch.setattr(
        half_products,
        "product",
        lambda a, *rest, **out: lengths.append(a.shape[-1]) or multiply(a, *rest, **out),
    )
    x, y = torch.randn(rows, 6).to(dtype), torch.randn(rows, 5).to(dtype)
    exact = x.double().mT @ y.double()
    assert error(half_products.over_rows(x, y, torch.float32, most=32), exact) < 1e-6
    out = torch.zeros(6, 9)[:, 2:7]
    half_products.over_rows(x[:, 2:], y, torch.float32, out=out[2:], most=32)
    assert error(out[2:], exact[2:]) < 1e-6 and not out[:2].any()
    assert max(lengths) <= 32
