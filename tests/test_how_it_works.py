"""The identities of docs/how_it_works.md hold: in float64, against autograd and explicit sums."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

M, WIDTH, CLASSES = 5, 4, 13
RATE, DECAY = 0.1, 0.01
# Two rows have the same target, and the first and the last class occur.
T = torch.tensor([1, 5, 5, CLASSES - 1, 0])


def log_taylor(s, q, c):
    return (CLASSES + s + q / 2).log() - (1 + c + c * c / 2).log()


@pytest.fixture(params=[False, True], ids=["no prior", "prior"])
def given(request):
    """W with the rows that were multiplied by u, H, u, π, and the derivatives of the loss."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    pi = drawn(CLASSES).exp() if request.param else torch.ones(CLASSES, dtype=torch.float64)
    pi *= CLASSES / pi.sum()
    W, H, u = drawn(CLASSES, WIDTH) * pi.sqrt()[:, None], drawn(M, WIDTH), pi.sqrt()
    return W, H, u, pi, drawn


def statistics(W, H, u, pi):
    """s, q and c from the outputs."""
    o = H @ W.mT / u
    return (pi * o).sum(1), (pi * o * o).sum(1), o[torch.arange(M), T]


def partials(W, H, u, pi):
    leaves = [x.detach().requires_grad_() for x in statistics(W, H, u, pi)]
    return torch.autograd.grad(log_taylor(*leaves).sum(), leaves)


def structured(W, H, u, pi):
    """A, b and X of the gradient W A + u bᵀ + E X."""
    ds, dq, dc = partials(W, H, u, pi)
    return 2 * (H.mT * dq) @ H, H.mT @ ds, (dc / u[T])[:, None] * H


def test_statistics_are_forms_of_the_hidden_row(given):
    W, H, u, pi, _ = given
    s, q, c = statistics(W, H, u, pi)
    assert_close(H @ (W.mT @ u), s)
    assert_close(torch.einsum("id,de,ie->i", H, W.mT @ W, H), q)
    assert_close((H * W[T]).sum(1) / u[T], c)


def test_gradients_are_those_of_autograd(given):
    W, H, u, pi, _ = given
    W, H = W.requires_grad_(), H.requires_grad_()
    dW, dH = torch.autograd.grad(log_taylor(*statistics(W, H, u, pi)).sum(), (W, H))
    W, H = W.detach(), H.detach()
    A, b, X = structured(W, H, u, pi)
    assert_close((W @ A + torch.outer(u, b)).index_add(0, T, X), dW)
    ds, dq, dc = (x[:, None] for x in partials(W, H, u, pi))
    assert_close(ds * (W.mT @ u) + 2 * dq * (H @ (W.mT @ W)) + dc / u[T][:, None] * W[T], dH)


def test_the_factors_take_the_step_of_sgd(given):
    W, H, u, pi, drawn = given
    A, b, X = structured(W, H, u, pi)
    dense = (1 - RATE * DECAY) * W - RATE * (W @ A + torch.outer(u, b)).index_add(0, T, X)
    step = (1 - RATE * DECAY) * torch.eye(WIDTH, dtype=W.dtype) - RATE * A
    b, X = -RATE * b, -RATE * X
    U, omega = drawn(WIDTH, WIDTH), drawn(WIDTH)
    V = (W - torch.outer(u, omega)) @ U.inverse()
    Q, mean = W.mT @ W, W.mT @ u
    C = step.mT @ (torch.outer(mean, b) + W[T].mT @ X)
    S = (T[:, None] == T).to(W.dtype)
    at = u[T] @ X
    U, omega, U_inv = U @ step, step.mT @ omega + b, step.inverse() @ U.inverse()
    assert_close(V.index_add(0, T, X @ U_inv) @ U + torch.outer(u, omega), dense)
    assert_close(step.mT @ mean + (u @ u) * b + X.mT @ u[T], dense.mT @ u)
    rest = (u @ u) * torch.outer(b, b) + X.mT @ S @ X + torch.outer(b, at) + torch.outer(at, b)
    assert_close(step.mT @ Q @ step + C + C.mT + rest, dense.mT @ dense)
