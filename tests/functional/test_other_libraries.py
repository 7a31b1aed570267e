"""What other libraries of losses ask of theirs, asked of these.

The ideas are those of the tests of Liger-Kernel and cut-cross-entropy (scaled and repeated
gradients, inputs that are not contiguous, errors in low precision), of entmax
(every dimension, permutations, sums) and of optax (axes, batches beside single examples).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from _cases import CASES
from softsphere.functional import log_prob, spherical_loss

ALL = sorted(CASES)
NORMALISED = [name for name in ALL if CASES[name][0].normalised]
every_loss = pytest.mark.parametrize("name", ALL)


def problem(rows: int = 8, classes: int = 33, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(rows, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(classes, (rows,), generator=generator)


def slope(logits: Tensor, target: Tensor, name: str, upstream: float = 1.0, **options) -> Tensor:
    leaf = logits.detach().requires_grad_()
    (spherical_loss(leaf, target, CASES[name][0], **options) * upstream).backward()
    assert leaf.grad is not None
    return leaf.grad


@every_loss
def test_a_scaled_loss_has_a_scaled_gradient(name):
    logits, target = problem()
    torch.testing.assert_close(
        slope(logits, target, name, -3.5), -3.5 * slope(logits, target, name)
    )


@every_loss
def test_backward_twice_gives_the_gradient_twice_and_leaves_the_input(name):
    logits, target = problem()
    before = logits.clone()
    leaf = logits.requires_grad_()
    loss = spherical_loss(leaf, target, CASES[name][0])
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)
    assert torch.equal(leaf.detach(), before)


@every_loss
def test_a_loss_in_the_middle_of_a_network(name):
    """Logits that are a view, and are used again after the loss."""
    hidden, target = problem()
    W = torch.randn(2, 33, 33, dtype=torch.float64).requires_grad_()
    logits = (hidden @ W[1].T)[:, torch.arange(33)].expand(1, -1, -1).transpose(1, 2)
    loss = spherical_loss(logits, target[None], CASES[name][0]) + logits.square().mean()
    got = torch.autograd.grad(loss, W)[0][1]
    fresh = W[1].detach().requires_grad_()
    plain = hidden @ fresh.T
    want = spherical_loss(plain, target, CASES[name][0]) + plain.square().mean()
    torch.testing.assert_close(got, torch.autograd.grad(want, fresh)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_loss
def test_gradients_in_low_precision_are_rounded_once(name, dtype):
    """The error of an entry is at most half a unit in its last place."""
    logits, target = problem(64, 257, scale=2.0)
    logits = logits.to(dtype).double()  # what low precision can hold
    got = slope(logits.to(dtype), target, name, reduction="sum").double()
    want = slope(logits, target, name, reduction="sum")
    limits = torch.finfo(dtype)
    unit = limits.eps * want.abs().clamp_min(limits.tiny)
    assert ((got - want).abs() <= 0.501 * unit + 1e-5 * want.abs().amax(1, keepdim=True)).all()


@every_loss
def test_order_of_classes_and_rows_changes_nothing(name):
    logits, target = problem()
    classes, rows = torch.randperm(33), torch.randperm(8)
    loss = CASES[name][0]
    want = spherical_loss(logits, target, loss, reduction="none")
    place = classes.argsort()
    got = spherical_loss(logits[:, classes], place[target], loss, reduction="none")
    torch.testing.assert_close(got, want)
    moved = spherical_loss(logits[rows], target[rows], loss, reduction="none")
    torch.testing.assert_close(moved, want[rows])


@pytest.mark.parametrize("name", NORMALISED)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_probabilities_along_every_dimension(name, dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    got = log_prob(x, CASES[name][0], dim)
    last = log_prob(x.movedim(dim, -1), CASES[name][0]).movedim(-1, dim)
    assert torch.equal(got, last)
    assert torch.autograd.gradcheck(lambda x: log_prob(x, CASES[name][0], dim), x, fast_mode=True)


@every_loss
def test_an_empty_batch_has_an_empty_loss(name):
    logits, target = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.long)
    loss = CASES[name][0]
    assert spherical_loss(logits, target, loss, reduction="none").shape == (0,)
    total = spherical_loss(logits, target, loss, reduction="sum")
    assert total == 0
    total.backward()
    assert logits.grad.shape == (0, 5)
    assert spherical_loss(logits, target, loss).isnan()
