"""Log-probabilities of both layers: gradients, second derivatives, transforms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from _devices import autocasts
from _output_layers import (
    CLOSE,
    COUNTS,
    LOSSES,
    SOME,
    SPHERICAL,
    D,
    Largest,
    OnLogits,
    all_or_some,
    d,
    every_kind,
    every_layer,
    layer,
    parts,
    rows,
    with_prior,
)
from _reading import read_in_chunks
from _twin import DenseTwin
from softsphere import (
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SphericalLoss,
)


@pytest.mark.parametrize("shape", [(3,), (2, 7)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@all_or_some
@with_prior
@every_layer
def test_value_and_gradients_are_those_of_the_criterion_on_logits(
    kind, name, prior, classes, bias, shape
):
    head = layer(kind, name, prior=prior, bias=bias)
    dense, hidden = OnLogits(head), rows(*shape)
    want, got = dense(hidden, classes), head.log_prob(hidden, classes)
    torch.testing.assert_close(got, want, **CLOSE)
    up = torch.randn_like(want)
    grads = torch.autograd.grad(got, [hidden, *head.parameters()], up)
    wanted = torch.autograd.grad(want, [hidden, *dense.parameters()], up)
    torch.testing.assert_close(parts(head, grads), list(wanted), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(head.log_prob(hidden, classes), want.detach(), **CLOSE)


@pytest.mark.parametrize("m", [3, 14])
@pytest.mark.parametrize("engine", ["dense", "chunked", "gram"])
def test_gradients_at_some_classes_are_right_by_every_engine(engine, m):
    head = layer(LinearSphericalLoss, engine=engine, prior=COUNTS)
    dense, hidden = OnLogits(head), rows(m)
    grads = [
        torch.autograd.grad(f(hidden, SOME).square().sum(), [hidden, *module.parameters()])
        for f, module in ((head.log_prob, head), (dense, dense))
    ]
    torch.testing.assert_close(*grads, **CLOSE)


@all_or_some
def test_a_prior_of_less_precision_is_that_of_the_criterion(classes):
    linear = nn.Linear(d, D, dtype=torch.float64)
    head, hidden = LinearSphericalLoss.from_linear(linear, prior=COUNTS), rows(4)
    head.prior = head.prior.float()
    grads = []
    for log_p in (head.log_prob(hidden, classes), OnLogits(head)(hidden, classes)):
        grads.append((log_p, *torch.autograd.grad(log_p.square().sum(), hidden)))
    with torch.no_grad():
        torch.testing.assert_close(head.log_prob(hidden, classes), grads[1][0], **CLOSE)
    torch.testing.assert_close(*grads, **CLOSE)


@all_or_some
@every_kind
def test_a_frozen_weight_leaves_the_gradient_of_hidden(kind, classes):
    head, hidden = layer(kind, prior=COUNTS), rows(4)
    want = torch.autograd.grad(OnLogits(head)(hidden, classes).square().sum(), hidden)
    head.requires_grad_(False)
    got = torch.autograd.grad(head.log_prob(hidden, classes).square().sum(), hidden)
    torch.testing.assert_close(got, want, **CLOSE)


@every_kind
def test_hidden_without_a_gradient_leaves_that_of_the_weight(kind):
    head = layer(kind)
    head.log_prob(rows(4).detach()).square().sum().backward()
    want = torch.autograd.grad(head.log_prob(rows(4)).square().sum(), head.weight)[0]
    assert torch.equal(head.weight.grad, want)


def test_the_gradient_of_hidden_alone_makes_nothing_of_the_size_of_the_weight():
    many = 5000
    head = FactoredSphericalLoss(d, many, prior=torch.rand(many) + 0.1)
    hidden = rows(4, dtype=torch.float32)
    head.log_prob(hidden, SOME)  # sums that are kept
    with Largest() as seen:
        torch.autograd.grad(head.log_prob(hidden, SOME).sum(), hidden)
    assert max(seen.made) < many


def test_log_prob_of_some_classes_makes_no_table_of_all_to_be_differentiated():
    many, m = 5000, 64
    head = LinearSphericalLoss(d, many)
    with Largest() as seen:
        head.log_prob(rows(m, dtype=torch.float32), SOME).sum().backward()
    assert max(seen.made) < many * m


@pytest.mark.parametrize("why", ["no_grad", "inference", "frozen"])
@every_kind
def test_without_a_gradient_one_table_is_made_and_the_rest_streamed(kind, why):
    head, hidden = layer(kind, prior=COUNTS), rows(5)
    want = head.log_prob(hidden).detach()
    read_in_chunks(head, 7)
    if why == "frozen":
        head.requires_grad_(False)
        hidden = hidden.detach()
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with contexts.get(why, torch.enable_grad)():
        head.log_prob(hidden)
        with Largest() as seen:
            got = head.log_prob(hidden)
    assert not got.requires_grad
    torch.testing.assert_close(got.clone(), want, **CLOSE)
    assert sum(size >= 5 * D for size in seen.made) == 1


@with_prior
def test_sgd_steps_a_factored_weight_through_log_prob_as_a_dense_one(prior):
    head = layer(FactoredSphericalLoss, prior=prior)
    state = head.state_dict()
    twin = DenseTwin(state["weight"].clone(), state["bias"].clone(), head.base_measure, lr=0.3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3)
    criterion = SphericalLoss(head.loss, prior=head.base_measure)
    for seed in range(3):
        hidden, target = rows(4, seed=seed), torch.arange(4)
        for log_p, sgd in (
            (head.log_prob(hidden), optimizer),
            (criterion.log_prob(twin.outputs(hidden)), twin.sgd),
        ):
            sgd.zero_grad()
            F.nll_loss(log_p, target).backward()
            sgd.step()
    torch.testing.assert_close(head.dense(), twin.W.detach(), **CLOSE)


def test_dense_gradients_of_a_factored_weight_add_up():
    head = layer(FactoredSphericalLoss)
    for _ in range(2):
        head.log_prob(rows(4)).square().sum().backward()
    once = torch.autograd.grad(head.log_prob(rows(4)).square().sum(), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, 2 * once, **CLOSE)
    head.zero_grad()
    head(rows(4), torch.arange(4)).backward()
    with pytest.raises(TypeError, match="gradient"):
        head.log_prob(rows(4)).sum().backward()


@all_or_some
def test_a_step_before_the_backward_is_told(classes):
    head = layer(FactoredSphericalLoss)
    log_p = head.log_prob(rows(4), classes)
    head(rows(4), torch.arange(4)).backward()
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    head.zero_grad()
    with pytest.raises(RuntimeError, match="changed since"):
        log_p.sum().backward()


def test_the_gradient_goes_through_a_parametrization():
    head, hidden = layer(LinearSphericalLoss), rows(4)
    plain = torch.autograd.grad(head.log_prob(hidden).square().sum(), head.weight)[0]

    class Twice(nn.Module):
        def forward(self, W):
            return 2 * W

        def right_inverse(self, W):
            return W / 2

    nn.utils.parametrize.register_parametrization(head, "weight", Twice())
    head.log_prob(hidden).square().sum().backward()
    torch.testing.assert_close(head.parametrizations.weight.original.grad, 2 * plain)


def test_gradients_join_those_that_accumulate():
    head, hidden, target = layer(LinearSphericalLoss, engine="gram"), rows(4), torch.arange(4)

    def pieces():
        yield head.log_prob(hidden).square().sum()
        yield head(hidden, target)
        yield head.log_prob(hidden, SOME).sum()

    want = torch.autograd.grad(sum(pieces()), [head.weight, head.bias])
    with head.accumulate():
        for piece in pieces():
            piece.backward()
    torch.testing.assert_close([head.weight.grad, head.bias.grad], list(want), **CLOSE)


@all_or_some
@every_kind
def test_gradients_have_the_same_digits_under_autocast(kind, classes, device):
    head = layer(kind, dtype=torch.float32)
    grads = []
    for inside in (True, False):
        hidden = rows(20, dtype=torch.float32)
        with torch.autocast(autocasts(device), torch.bfloat16, enabled=inside):
            log_p = head.log_prob(hidden, classes)
        assert log_p.dtype == torch.float32
        grads.append(torch.autograd.grad(log_p.square().sum(), [hidden, *head.parameters()]))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@all_or_some
def test_gradients_of_bfloat16_are_computed_in_float32(classes):
    head = layer(LinearSphericalLoss, dtype=torch.bfloat16)
    wide = layer(LinearSphericalLoss, dtype=torch.float32)
    wide.load_state_dict(head.state_dict())
    one = rows(20, dtype=torch.float32).detach().bfloat16().requires_grad_()
    two = one.detach().float().requires_grad_()
    got, want = (
        torch.autograd.grad(x.log_prob(h, classes).square().sum(), [h, *x.parameters()])
        for x, h in ((head, one), (wide, two))
    )
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.float(), y, rtol=0, atol=2**-7 * float(y.abs().max()))


def second(log_prob, hidden, parameters):
    first = torch.autograd.grad(
        log_prob(hidden).square().sum(), [hidden, *parameters], create_graph=True
    )
    return torch.autograd.grad(sum(x.square().sum() for x in first), [hidden, *parameters])


@pytest.mark.parametrize("engine", ["dense", "chunked", "gram"])
@pytest.mark.parametrize("name", LOSSES)
@all_or_some
def test_second_derivatives_are_right_or_refused(name, engine, classes):
    head = layer(LinearSphericalLoss, name, engine, prior=COUNTS)
    dense, hidden = OnLogits(head), rows(14)

    def find():
        return second(lambda h: head.log_prob(h, classes), hidden, head.parameters())

    if classes is not None and engine != "dense" and name in SPHERICAL:
        with pytest.raises(RuntimeError, match=r'LinearSphericalOptions\(engine="dense"\)'):
            find()
        return
    want = second(lambda h: dense(h, classes), hidden, dense.parameters())
    torch.testing.assert_close(find(), want, rtol=1e-9, atol=1e-9)


@all_or_some
def test_second_derivatives_of_a_factored_layer_are_refused(classes):
    head, hidden = layer(FactoredSphericalLoss), rows(4)
    log_p = head.log_prob(hidden, classes).square().sum()
    with pytest.raises(RuntimeError, match=r'LinearSphericalOptions\(engine="dense"\)'):
        torch.autograd.grad(log_p, hidden, create_graph=True)


def forward_mode(f):
    def tangent(h):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(h, torch.ones_like(h)))).tangent

    return tangent


TRANSFORMS = {
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(lambda h: f(h).square().sum()),
    "vmap": torch.func.vmap,
    "forward": forward_mode,
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@all_or_some
@every_layer
def test_transforms_are_those_of_the_logits(kind, name, classes, transform, trained):
    head = layer(kind, name, prior=COUNTS).requires_grad_(trained)
    dense, hidden = OnLogits(head), rows(3).detach()
    read_in_chunks(head, 7)
    got, want = (
        TRANSFORMS[transform](lambda h, f=f: f(h, classes))(hidden)
        for f in (head.log_prob, lambda h, c: dense(h.view(-1, d), c).view(*h.shape[:-1], -1))
    )
    torch.testing.assert_close(got, want, **CLOSE)


@every_kind
def test_predictions_can_be_mapped(kind):
    head, hidden = layer(kind, prior=COUNTS), rows(5).detach()
    read_in_chunks(head, 7)
    target, vmap = torch.arange(8, 28, 4), torch.func.vmap
    assert torch.equal(vmap(head.predict)(hidden), head.predict(hidden))
    log_p = head.log_prob(hidden).detach()
    above = log_p > log_p.gather(1, target.unsqueeze(1))
    assert torch.equal(head.rank(hidden, target), 1 + above.sum(1))
    assert torch.equal(vmap(head.rank)(hidden, target), 1 + above.sum(1))
    values = vmap(lambda h: head.topk(h, 3).values)(hidden)
    torch.testing.assert_close(values, head.topk(hidden, 3).values, **CLOSE)


class Probabilities(LinearSphericalLoss):
    def forward(self, hidden, classes=None):
        return self.log_prob(hidden, classes)


@all_or_some
def test_an_ensemble_is_mapped_over_its_weights(classes):
    heads, hidden = [Probabilities(d, D, dtype=torch.float64) for _ in range(3)], rows(4).detach()
    state = torch.func.stack_module_state(heads)
    with torch.no_grad():
        got = torch.func.vmap(
            lambda *state: torch.func.functional_call(heads[0], state, (hidden, classes))
        )(*state)
        want = torch.stack([head(hidden, classes) for head in heads])
    torch.testing.assert_close(got, want, **CLOSE)


def test_a_mapped_factored_layer_has_the_gradient_of_hidden():
    head, hidden = layer(FactoredSphericalLoss), rows(3)
    got, want = (
        torch.autograd.grad(f(hidden).square().sum(), hidden)
        for f in (torch.func.vmap(head.log_prob), head.log_prob)
    )
    torch.testing.assert_close(got, want, **CLOSE)


@all_or_some
def test_transforms_do_not_lose_the_gradient_of_a_factored_weight(classes):
    head = layer(FactoredSphericalLoss)
    log_p = torch.func.vmap(lambda h: head.log_prob(h, classes))(rows(3).detach())
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        log_p.sum().backward()
