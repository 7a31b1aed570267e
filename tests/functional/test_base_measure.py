"""Masked classes: each loss is that of the logits of the classes that take part, alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import softsphere
from _cases import CASES
from softsphere import SphericalLoss, losses
from softsphere.functional import (
    linear_spherical_loss,
    log_prob,
    log_taylor_softmax,
    spherical_loss,
    spherical_softmax,
    taylor_softmax,
)

ALL = sorted(CASES)
C = 7
PRIORS = {"uniform": None, "prior": torch.arange(1.0, 8.0, dtype=torch.float64)}
NOTHINGS = [-torch.inf, torch.nan, torch.inf, -1e4]

every_loss = pytest.mark.parametrize("name", ALL)
both_priors = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())


def problem(per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets that take part, and a mask."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, C, dtype=torch.float64, generator=generator)
    target = torch.tensor([1, 2, 6, 3, 2])
    if not per_row:
        return logits, target, torch.tensor([False, True, True, True, False, True, True])
    mask = torch.rand(5, C, generator=generator) < 0.6
    for t in (target, (target + 1) % C):  # two classes at least
        mask = mask.scatter(1, t[:, None], True)
    return logits, target, mask


def alone(logits: Tensor, target: Tensor, mask: Tensor, loss, prior, **options) -> list[Tensor]:
    """Each row's loss and gradient, from the logits of its own classes alone."""
    found = []
    for row, t, kept in zip(logits, target, mask.expand(logits.shape), strict=True):
        leaf = row[kept].clone().requires_grad_()
        place = kept[:t].sum()
        pi = None if prior is None else prior[kept]
        given = {k: v[kept] if k == "weight" else v for k, v in options.items()}
        value = spherical_loss(leaf, place, loss, prior=pi, reduction="sum", **given)
        (slope,) = torch.autograd.grad(value, leaf)
        found.append((value.detach(), torch.zeros(C).double().masked_scatter(kept, slope)))
    return [torch.stack(x) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("nothing", NOTHINGS)
@pytest.mark.parametrize("per_row", [False, True])
@both_priors
@every_loss
def test_masked_classes_are_as_if_they_were_not_there(name, prior, per_row, nothing):
    loss = CASES[name][0]
    logits, target, mask = problem(per_row)
    want, slopes = alone(logits, target, mask, loss, prior)
    o = logits.masked_fill(~mask, nothing).requires_grad_()
    got = spherical_loss(o, target, loss, mask=mask, prior=prior, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    (slope,) = torch.autograd.grad(got.sum(), o)
    torch.testing.assert_close(slope, slopes, rtol=1e-9, atol=1e-10)
    assert not slope[~mask.expand(o.shape)].any()


@pytest.mark.parametrize("per_row", [False, True])
@both_priors
@every_loss
def test_smoothing_and_weights_see_the_classes_that_take_part(name, prior, per_row):
    loss = CASES[name][0]
    if not loss.smoothable:
        pytest.skip("it has no label smoothing")
    logits, target, mask = problem(per_row)
    options = {"label_smoothing": 0.3, "weight": torch.linspace(0.5, 2, C).double()}
    want, slopes = alone(logits, target, mask, loss, prior, **options)
    o = logits.masked_fill(~mask, torch.nan).requires_grad_()
    got = spherical_loss(o, target, loss, mask=mask, prior=prior, reduction="none", **options)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    (slope,) = torch.autograd.grad(got.sum(), o)
    torch.testing.assert_close(slope, slopes, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("per_row", [False, True])
@every_loss
def test_class_probabilities_and_sparse_targets(name, per_row, smoothing):
    loss = CASES[name][0]
    if smoothing and not loss.smoothable:
        pytest.skip("it has no label smoothing")
    logits, target, mask = problem(per_row)
    o = logits.masked_fill(~mask, -torch.inf)
    options = {"mask": mask, "reduction": "none"}
    one_hot = nn.functional.one_hot(target, C).double()
    soft = spherical_loss(o, one_hot, loss, label_smoothing=smoothing, **options)
    if not isinstance(loss, losses.SquaredError) or not smoothing:
        hard = spherical_loss(o, target, loss, label_smoothing=smoothing, **options)
        torch.testing.assert_close(soft, hard)
    padded = torch.stack([target, torch.full_like(target, -1)], 1)
    values = torch.tensor([[1.0, 9.0]] * 5).double()
    sparse = spherical_loss(o, padded, loss, target_values=values, **options)
    torch.testing.assert_close(sparse, spherical_loss(o, target, loss, **options))


@every_loss
def test_ignored_rows_need_no_class(name):
    loss = CASES[name][0]
    logits, target, mask = problem(True)
    want = spherical_loss(logits[1:], target[1:], loss, mask=mask[1:])
    target[0], mask[0] = -100, False
    o = logits.masked_fill(~mask, -torch.inf).requires_grad_()
    got = spherical_loss(o, target, loss, mask=mask)
    torch.testing.assert_close(got, want)
    got.backward()
    assert o.grad.isfinite().all() and not o.grad[0].any()


@every_loss
def test_shapes_of_criteria(name):
    """(C), (N, C, d1) and a mask for all rows, by a criterion."""
    criterion = SphericalLoss(CASES[name][0], reduction="none")
    logits, target, mask = problem(True)
    rows = criterion(logits, target, mask=mask)
    one = criterion(logits[0], target[0], mask=mask[0])
    torch.testing.assert_close(one, rows[0])
    deep = criterion(logits.T.unsqueeze(0), target.unsqueeze(0), mask=mask.T.unsqueeze(0))
    torch.testing.assert_close(deep, rows.unsqueeze(0))
    shared = torch.tensor([False, True, True, True, False, True, True])
    deep = criterion(logits.T.unsqueeze(0), target.unsqueeze(0), mask=shared)
    torch.testing.assert_close(deep, criterion(logits, target, mask=shared).unsqueeze(0))


@pytest.mark.parametrize("per_row", [False, True])
@every_loss
def test_transforms_and_second_derivatives(name, per_row):
    loss = CASES[name][0]
    logits, target, mask = problem(per_row)
    mask = mask.expand(logits.shape)

    def one(o, t, m):
        return spherical_loss(o, t, loss, mask=m)

    o = logits.clone().requires_grad_()
    rows = spherical_loss(o, target, loss, mask=mask, reduction="none")
    torch.testing.assert_close(torch.func.vmap(one)(logits, target, mask), rows)
    (slope,) = torch.autograd.grad(rows.sum(), o)
    got = torch.func.vmap(torch.func.grad(one))(logits, target, mask)
    torch.testing.assert_close(got, slope)
    small = logits[:2].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda o: spherical_loss(o, target[:2], loss, mask=mask[:2]), small
    )


@pytest.mark.parametrize(
    ("name", "per_row"),
    [
        ("taylor_softmax", False),
        ("taylor_softmax", True),
        ("z_loss", True),
        ("softmax", False),
        # its bisection is compiled without a mask in the default run
        pytest.param("bouchard_bound", True, marks=pytest.mark.slow),
    ],
)
def test_compile_with_a_mask(name, per_row):
    torch.compiler.reset()
    criterion = SphericalLoss(name, prior=torch.arange(1.0, 8.0))
    logits, target, mask = problem(per_row)
    a, b = (logits.float().masked_fill(~mask, -torch.inf).requires_grad_() for _ in range(2))
    with torch._functorch.config.patch(ban_recompute_used_far_apart=False):
        got = torch.compile(criterion, fullgraph=True, backend="aot_eager")(a, target, mask=mask)
    want = criterion(b, target, mask=mask)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("per_row", [False, True])
def test_probabilities_and_predictions(per_row):
    logits, _, mask = problem(per_row)
    o = logits.masked_fill(~mask, torch.nan).requires_grad_()
    full = mask.expand(o.shape)
    criterion = softsphere.TaylorSoftmaxLoss(prior=torch.arange(1.0, 8.0))
    rows = criterion.log_prob(o, mask=mask)
    assert rows[~full].eq(-torch.inf).all()
    torch.testing.assert_close(rows.exp().sum(1), torch.ones(5).double())
    (slope,) = torch.autograd.grad(rows[full].sum(), o)
    assert slope.isfinite().all() and not slope[~full].any()
    for row, kept, p in zip(logits, full, taylor_softmax(o, mask=mask), strict=True):
        torch.testing.assert_close(p[kept], taylor_softmax(row[kept]))
        assert not p[~kept].any()
    torch.testing.assert_close(log_taylor_softmax(o, mask=mask).exp(), taylor_softmax(o, mask=mask))
    assert not spherical_softmax(o.T, 0, mask=mask.T if per_row else mask).T[~full].any()
    for name in ("taylor_softmax", "z_loss", "softmax"):
        criterion = SphericalLoss(name)
        best = criterion.topk(o, 2, mask=mask)
        for row, kept, index in zip(logits, full, best.indices, strict=True):
            want = criterion.topk(row[kept], 2).indices
            torch.testing.assert_close(index, kept.nonzero().squeeze(1)[want])
        assert torch.equal(criterion.predict(o, mask=mask), best.indices[:, 0])


LOGITS, TARGET = torch.zeros(2, 3), torch.tensor([0, 1])
KEPT = torch.tensor([True, True, False])
WRONG = {
    r"mask must be a boolean tensor, True where a class takes part, got torch.float32": (
        TypeError,
        lambda: spherical_loss(LOGITS, TARGET, "z_loss", mask=torch.zeros(2, 3)),
    ),
    r"mask must have shape \(3,\), one entry per class, or the shape of the logits \(2, 3\)": (
        ValueError,
        lambda: spherical_loss(LOGITS, TARGET, "z_loss", mask=torch.ones(2).bool()),
    ),
    "target must be a class that takes part": (
        ValueError,
        lambda: spherical_loss(LOGITS, TARGET + 1, "z_loss", mask=KEPT),
    ),
    "target must be a class that takes part, got one whose mask": (
        ValueError,
        lambda: spherical_loss(LOGITS, torch.ones(2, 3) / 3, "z_loss", mask=KEPT),
    ),
    "at least one class of each row": (
        ValueError,
        lambda: log_prob(LOGITS, "softmax", mask=torch.zeros(3).bool()),
    ),
    "a mask for each row needs the logits": (
        ValueError,
        lambda: linear_spherical_loss(
            torch.zeros(2, 4), torch.zeros(3, 4), TARGET, "z_loss", mask=KEPT.expand(2, 3)
        ),
    ),
    "needs at least 2 classes, got 1": (
        ValueError,
        lambda: spherical_loss(
            LOGITS, TARGET * 0, "bouchard_bound", mask=torch.tensor([True, False, False])
        ),
    ),
}  # fmt: skip


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("message", WRONG)
def test_wrong_masks(message):
    kind, call = WRONG[message]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.once("values are checked on a CPU alone")
@every_loss
def test_minus_infinity_is_a_probability_of_zero_or_an_error(name):
    loss = CASES[name][0]
    logits, target, mask = problem(False)
    o = logits.masked_fill(~mask, -torch.inf)
    exponential = getattr(loss, "order", None) is None
    if isinstance(loss, losses.OnLogits) and exponential:
        want = spherical_loss(o, target, loss, mask=mask)
        torch.testing.assert_close(spherical_loss(o, target, loss), want)
        torch.testing.assert_close(log_prob(o, loss), log_prob(o, loss, mask=mask))
        return
    with pytest.raises(ValueError, match=r"got −inf; .*mask=…"):
        spherical_loss(o, target, loss)
    if loss.normalised:
        for call in (lambda: log_prob(o, loss), lambda: SphericalLoss(loss).predict(o)):
            with pytest.raises(ValueError, match=r"got −inf; .*mask=…"):
                call()
    else:
        assert mask[SphericalLoss(loss).predict(o)].all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@both_priors
@every_loss
def test_gradients_of_probabilities_and_class_weights(name, prior, smoothing):
    """They are those of the classes that take part alone, and 0 for the others."""
    loss = CASES[name][0]
    if isinstance(loss, losses.SquaredError) or (smoothing and not loss.smoothable):
        pytest.skip("the loss does not have them")
    logits, target, mask = problem(False)
    p = torch.where(mask, logits.softmax(1), 0.0)
    weight = torch.arange(1.0, 8.0).double()
    options = {"label_smoothing": smoothing}
    place = (mask.cumsum(0) - 1)[target]
    for goal, of_few in ((p, p[:, mask]), (target, place)):
        whole = [goal, weight.clone().requires_grad_()]
        few = [of_few, weight[mask].clone().requires_grad_()]
        if goal is p:
            whole[0], few[0] = p.clone().requires_grad_(), of_few.clone().requires_grad_()
        got = spherical_loss(
            logits, whole[0], loss, mask=mask, weight=whole[1], prior=prior, **options
        )
        few_pi = None if prior is None else prior[mask]
        want = spherical_loss(logits[:, mask], few[0], loss, weight=few[1], prior=few_pi, **options)
        torch.testing.assert_close(got, want)
        leaves = [[x for x in given if x.requires_grad] for given in (whole, few)]
        slopes, wanted = torch.autograd.grad(got, leaves[0]), torch.autograd.grad(want, leaves[1])
        for slope, right in zip(slopes, wanted, strict=True):
            torch.testing.assert_close(slope[..., mask], right)
            assert not slope[..., ~mask].any()


@both_priors
@every_loss
def test_gradients_of_target_values(name, prior):
    """A value of 0 has a gradient like any other; padding has none, also if class 0 is masked."""
    loss = CASES[name][0]
    logits, target, mask = problem(False)
    sparse = torch.stack([target, torch.full_like(target, 3), torch.full_like(target, -1)], 1)
    sparse[3, 1] = 1
    values = torch.tensor([[1.0, 0.0, 9.0]] * 5).double().requires_grad_()
    got = spherical_loss(logits, sparse, loss, target_values=values, mask=mask, prior=prior)
    few = torch.where(sparse == -1, -1, (mask.cumsum(0) - 1)[sparse])
    few_values = values.detach().clone().requires_grad_()
    few_pi = None if prior is None else prior[mask]
    want = spherical_loss(logits[:, mask], few, loss, target_values=few_values, prior=few_pi)
    (slope,), (right,) = torch.autograd.grad(got, values), torch.autograd.grad(want, few_values)
    torch.testing.assert_close(slope, right)
    assert not slope[:, 2].any() and slope[:, 1].all()


@pytest.mark.once("values are checked on a CPU alone")
def test_rows_without_a_class_are_told_before_their_targets():
    nothing = torch.zeros(3).bool()
    W = torch.ones(3, 4)
    for goal in (TARGET, torch.ones(2, 3) / 3):
        with pytest.raises(ValueError, match="mask must be True for at least one class"):
            spherical_loss(LOGITS, goal, "taylor_softmax", mask=nothing)
        with pytest.raises(ValueError, match="mask must be True for at least one class"):
            linear_spherical_loss(torch.ones(2, 4), W, goal, "taylor_softmax", mask=nothing)
