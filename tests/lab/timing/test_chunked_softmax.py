"""Softmax in chunks of rows: the loss and both gradients are those of PyTorch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from softsphere_lab.timing.chunked_softmax import chunked_softmax
from softsphere_lab.timing.memory import extra_bytes


def batch(m, D, d, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(m, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(D, d, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(D, (m,), generator=generator)


def gradients(loss, hidden, weight, target, upstream=1.0):
    """The loss and, times `upstream`, its gradients."""
    value = loss(hidden, weight, target)
    return value, *torch.autograd.grad(upstream * value, (hidden, weight))


def plain(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight), target)


@pytest.mark.parametrize("rows", [1, 16, 50, 64])
@pytest.mark.parametrize("upstream", [1.0, -3.0])
def test_chunks_are_exact(rows, upstream):
    """Chunks that divide the rows, chunks that do not, and a single one."""
    given = batch(50, 101, 7, torch.float64)
    found = gradients(chunked_softmax(rows, compiled=False), *given, upstream)
    for mine, exact in zip(found, gradients(plain, *given, upstream), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-14)


def test_logits_far_from_zero_do_not_overflow():
    hidden, weight, target = batch(10, 20, 5, torch.float64)
    given = (hidden.detach().mul(1e4).requires_grad_(), weight, target)
    found = gradients(chunked_softmax(4, compiled=False), *given)
    for mine, exact in zip(found, gradients(plain, *given), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-14)


def test_chunks_of_bfloat16_are_summed_in_float32():
    """Many chunks have no larger error than one, whose product rounds once."""
    given = batch(1024, 32, 16, torch.bfloat16)
    exact = gradients(plain, *(x.detach().double().requires_grad_() for x in given[:2]), given[2])
    errors = []
    for rows in (1024, 4):
        by_weight = gradients(chunked_softmax(rows, compiled=False), *given)[2]
        assert by_weight.dtype == torch.bfloat16
        errors.append(float((by_weight - exact[2]).norm()))
    assert errors[1] < 1.5 * errors[0]


def test_no_logits_are_kept():
    hidden, weight, target = batch(512, 2000, 8, torch.float32)
    loss = chunked_softmax(16, compiled=False)
    # a few chunks of 16 rows, and the gradient of the weight twice
    logits = 4 * 512 * 2000
    assert extra_bytes(lambda: gradients(loss, hidden, weight, target)) < logits / 4


@pytest.mark.slow
def test_compiled_chunks_are_exact():
    given = batch(50, 101, 7, torch.float64)
    found = gradients(chunked_softmax(16, compiled=True), *given)
    for mine, exact in zip(found, gradients(plain, *given), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-14)
