"""The losses of the root of a clustered layer against F.linear and F.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from softsphere import ClusteredLoss
from softsphere.functional.root_losses import has_root_losses, root_losses

m, d, R = 6, 4, 5
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
ENTRY = torch.tensor([0, 3, 3, 4, 0, 1])
EMPTY = torch.tensor([False, False, True, False, False])


def given(scale=1.0):
    draw = torch.Generator().manual_seed(0)
    shapes = (m, d), (R, d), (R,)
    made = [scale * torch.randn(*shape, generator=draw).double() for shape in shapes]
    return [x.requires_grad_() for x in made]


def by_pytorch(H, W, b, empty):
    o = F.linear(H, W, b)
    if empty is not None:
        o = o.masked_fill(empty, -torch.inf)
    return F.cross_entropy(o, ENTRY, reduction="none")


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("empty", [None, EMPTY], ids=["all", "empty"])
@pytest.mark.parametrize("biased", [True, False])
def test_losses_and_gradients_are_those_of_cross_entropy(scale, empty, biased):
    H, W, b = given(scale)
    b = b if biased else None
    known = [x for x in (H, W, b) if x is not None]
    found, want = root_losses(H, W, b, ENTRY, empty), by_pytorch(H, W, b, empty)
    torch.testing.assert_close(found, want, **CLOSE)
    upstream = torch.linspace(-1, 2, m).double()
    gradients = torch.autograd.grad(found, known, upstream)
    wanted = torch.autograd.grad(want, known, upstream)
    for x, y in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("empty", [None, EMPTY], ids=["all", "empty"])
def test_second_derivatives(empty):
    assert torch.autograd.gradgradcheck(
        lambda *known: root_losses(*known, ENTRY, empty), given(), fast_mode=True
    )


def test_a_loss_with_a_penalty_on_its_gradient():
    """First and second derivatives come to the same backward."""

    def total(losses, known):
        gradients = torch.autograd.grad(losses.sum(), known, create_graph=True)
        return losses.sum() + sum((x * x).sum() for x in gradients)

    known = given()
    found = torch.autograd.grad(total(root_losses(*known, ENTRY, None), known), known)
    want = torch.autograd.grad(total(by_pytorch(*known, None), known), known)
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_only_the_gradients_that_are_needed_are_made():
    H, W, b = given()
    for known in (H, W, b):
        alone = [x if x is known else x.detach() for x in (H, W, b)]
        (found,) = torch.autograd.grad(root_losses(*alone, ENTRY, None).sum(), known)
        (want,) = torch.autograd.grad(by_pytorch(*alone, None).sum(), known)
        torch.testing.assert_close(found, want, **CLOSE)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


# What may happen to the root so that a call of it doubles its outputs.
CHANGES = {
    "a hook": lambda root: root.register_forward_hook(lambda module, args, o: 2 * o),
    "a forward": lambda root: setattr(root, "forward", lambda x: 2 * F.linear(x, root.weight)),
    "a class": lambda root: setattr(root, "__class__", Doubled),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_root_that_is_more_than_a_linear_layer_is_called(change):
    head = ClusteredLoss(d, 12, torch.arange(12) // 4 - 1)
    hidden, target = torch.randn(m, d), torch.arange(m)
    assert has_root_losses(head.root, hidden)
    before = head(hidden, target)
    CHANGES[change](head.root)
    assert not has_root_losses(head.root, hidden)
    assert head(hidden, target) != before


def test_a_root_is_called_for_autocast_for_hooks_of_all_modules_and_for_another_dtype():
    root, hidden = torch.nn.Linear(d, R), torch.randn(m, d)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        assert not has_root_losses(root, hidden)
    assert not has_root_losses(root, hidden.double())
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, o: None)
    assert not has_root_losses(root, hidden)
    hook.remove()
    assert has_root_losses(root, hidden)
