"""Half-precision logits in parts of rows: the numbers of the whole, in little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from _bytes import most_bytes
from _cases import CASES
from softsphere import losses
from softsphere.engines import row_statistics
from softsphere.functional import spherical_loss

ALL = sorted(CASES)
ROWS, C = 12, 33


def problem(form: str, loss: losses.Loss) -> dict[str, Any] | None:
    """Arguments besides the logits, or None if the loss does not have the form."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(C, (ROWS,), generator=generator)
    target[3] = -100
    if form == "smoothed":
        return {"target": target, "label_smoothing": 0.2} if loss.smoothable else None
    if form == "probabilities":
        p = torch.rand(ROWS, C, generator=generator)
        return {"target": (p / p.sum(1, keepdim=True)).bfloat16()}
    if form == "sparse":
        pairs = torch.randint(-1, C, (ROWS, 3), generator=generator)
        return {"target": pairs, "target_values": torch.randn(ROWS, 3, generator=generator)}
    if form == "masked":
        mask = torch.rand(ROWS, C, generator=generator) < 0.5
        for t in (target.clamp_min(0), (target + 1) % C):
            mask = mask.scatter(1, t[:, None], True)
        return {"target": target, "mask": mask}
    return {"target": target, "weight": torch.linspace(0.5, 2, C)}


FORMS = ["indices", "smoothed", "probabilities", "sparse", "masked"]


def logits() -> Tensor:
    return torch.randn(ROWS, C, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ALL)
def test_parts_are_the_whole(name, form, prior, monkeypatch):
    loss = CASES[name][0]
    options = problem(form, loss)
    if options is None:
        pytest.skip("the loss does not have it")
    if prior:
        options["prior"] = torch.linspace(1, 3, C)
    found = []
    for size in (1 << 20, 5 * C, 1):
        monkeypatch.setattr(row_statistics, "ON_CPU", size)
        leaf = logits().requires_grad_()
        rows = spherical_loss(leaf, loss=loss, reduction="none", **options)
        rows.float().sum().backward()
        found.append((rows.detach(), leaf.grad))
    for got in found[1:]:
        torch.testing.assert_close(got, found[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["taylor_softmax", "softmax"])
def test_second_derivatives_in_parts(name, form, monkeypatch):
    options = problem(form, CASES[name][0])
    found = []
    for size in (1 << 20, C):
        monkeypatch.setattr(row_statistics, "ON_CPU", size)
        leaf = logits().requires_grad_()
        loss = spherical_loss(leaf, loss=name, reduction="sum", **options)
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.float().square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


def test_weights_that_want_a_gradient_get_it(monkeypatch):
    monkeypatch.setattr(row_statistics, "ON_CPU", C)
    target = torch.randint(C, (ROWS,))
    weight = torch.ones(C, requires_grad=True)
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "sum"}
    (got,) = torch.autograd.grad(spherical_loss(logits(), target, "softmax", **options), weight)
    wide = spherical_loss(logits().float(), target, "softmax", **options)
    torch.testing.assert_close(got, torch.autograd.grad(wide, weight)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.once("rows are taken in parts on a CPU alone")
def test_a_target_that_is_changed_before_the_backward_is_told(monkeypatch):
    monkeypatch.setattr(row_statistics, "ON_CPU", C)
    target = torch.randint(C, (ROWS,))
    loss = spherical_loss(logits().requires_grad_(), target, "softmax")
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.once("rows are taken in parts on a CPU alone")
@pytest.mark.parametrize("form", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("name", ["taylor_softmax", "z_loss", "softmax", "soft_margin"])
def test_memory_of_half_precision(name, form, monkeypatch):
    """The gradient, of one size, and tensors of a part of the rows: F.cross_entropy has 3 sizes."""
    monkeypatch.setattr(row_statistics, "ON_CPU", 1 << 14)
    loss = CASES[name][0]
    if form == "smoothed" and not loss.smoothable:
        pytest.skip("it has no label smoothing")
    x = torch.randn(128, 4096).bfloat16()
    target = torch.randint(4096, (128,))
    if form == "probabilities":
        target = torch.rand(128, 4096).bfloat16()
    options = {"label_smoothing": 0.1} if form == "smoothed" else {}
    assert most_bytes(loss, x, target, **options) < 2


@pytest.mark.parametrize(
    ("loss", "dtype", "smoothing"),
    [
        (losses.TaylorSoftmax(), torch.bfloat16, 0.0),
        (losses.TaylorSoftmax(), torch.bfloat16, 0.1),
        (losses.ZLoss(), torch.float32, 0.0),
        (losses.ZLoss(), torch.bfloat16, 0.0),
    ],
)
def test_several_gradients_at_once(loss, dtype, smoothing, monkeypatch):
    monkeypatch.setattr(row_statistics, "ON_CPU", 10)
    monkeypatch.setattr(row_statistics, "ON_DEVICE", 10)
    o = torch.randn(6, 9).to(dtype).requires_grad_()
    upstream = torch.randn(3, 6).to(dtype)

    def gradient(v, **options):
        given = {"reduction": "none", "label_smoothing": smoothing}
        value = spherical_loss(o, torch.arange(6), loss, **given).to(dtype)
        return torch.autograd.grad(value, o, v, **options)[0]

    want = torch.stack([gradient(v) for v in upstream])
    torch.testing.assert_close(gradient(upstream, is_grads_batched=True), want)
