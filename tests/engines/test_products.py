"""Products of half-precision factors, and the gram engine that multiplies them as they are."""

from __future__ import annotations

import pytest
import torch

from _engines import layer, with_gradients
from softsphere import LinearSphericalOptions
from softsphere.engines import moments, products
from softsphere.functional import linear_spherical_loss

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
def test_low_precision_factors_multiplied_as_they_are(monkeypatch, bias, dtype):
    """What a GPU does, with its product of low-precision factors put in by hand."""
    H, W, b = layer(63, 507, 32, dtype, bias)
    target, options = torch.randint(507, (63,)), LinearSphericalOptions("gram", class_chunk=100)

    def run():
        loss = linear_spherical_loss(
            H, W, target, "taylor_softmax", linear_bias=b, options=options, reduction="sum"
        )
        return with_gradients(loss, H, W, b)

    want, used = run(), []

    def product(x, y, out_dtype, out=None):
        used.append(x.dtype)
        return torch.mm(x.to(out_dtype), y.to(out_dtype), out=out)

    monkeypatch.setattr(moments, "multiplies", lambda x, dtype: x.dtype != dtype)
    monkeypatch.setattr(moments, "product", product)
    for x, y in zip(run(), want, strict=True):
        assert (x.double() - y.double()).norm() <= torch.finfo(dtype).eps * y.double().norm()
    # six chunks, both ways, and with a bias as many products of a column
    assert used.count(dtype) == (24 if bias else 12)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rounding_to_float16_neither_vanishes_nor_overflows(size):
    A = size * torch.rand(4, 4)
    low, scale = products.rounded(A, torch.float16)
    torch.testing.assert_close(low.float() * scale, A, rtol=1e-3, atol=1e-6 * size)
    low, scale = products.rounded(torch.zeros(2, 2), torch.float16)
    assert not (low.float() * scale).any()
