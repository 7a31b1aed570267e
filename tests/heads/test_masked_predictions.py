"""Predictions with a mask: those of the layer of the classes that take part, alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
    SphericalLoss,
)
from softsphere.losses import REGISTRY, Spherical

d, D = 4, 37
MASK = torch.arange(D) % 3 != 0
PRIORS = {"uniform": None, "prior": torch.arange(1.0, D + 1)}
# Predictions beside hidden, by the arguments that they take.
PREDICTIONS = {
    "log_prob": {},
    "topk": {"k": 3},
    "predict": {},
    "rank": {"target": torch.tensor([1, 5])},
}
ENGINES = [(loss, "auto") for loss in REGISTRY] + [
    (loss, engine)
    for loss, kind in REGISTRY.items()
    for engine in ("gram", "chunked", "dense")
    if issubclass(kind, Spherical)
]
WITHOUT = {
    "factored": lambda: FactoredSphericalLoss(d, D),
    "clusters": lambda: ClusteredLoss(d, D, torch.arange(D) % 4 - 1),
}


def layer(loss: str, prior: torch.Tensor | None, engine: str = "auto") -> LinearSphericalLoss:
    torch.manual_seed(0)
    options = LinearSphericalOptions(engine=engine)
    head = LinearSphericalLoss(d, D, loss, prior=prior, options=options, dtype=torch.float64)
    with torch.no_grad():  # what is masked may be anything
        head.weight[~MASK], head.bias[~MASK] = torch.nan, torch.inf
    return head


def alone(head: LinearSphericalLoss, prior: torch.Tensor | None) -> LinearSphericalLoss:
    """The layer of the classes in the mask."""
    own = None if prior is None else prior[MASK]
    few = LinearSphericalLoss(d, int(MASK.sum()), head.loss, prior=own, dtype=torch.float64)
    with torch.no_grad():
        few.weight.copy_(head.weight[MASK])
        few.bias.copy_(head.bias[MASK])
    return few


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("loss", [x for x, kind in REGISTRY.items() if kind.normalised])
def test_log_prob_is_that_of_the_other_classes(loss, prior, recorded):
    head = layer(loss, PRIORS[prior])
    few = alone(head, PRIORS[prior])
    hidden = torch.randn(2, 5, d, dtype=torch.float64, requires_grad=recorded)
    same = hidden.detach().clone().requires_grad_(recorded)
    with torch.set_grad_enabled(recorded):
        got, want = head.log_prob(hidden, mask=MASK), few.log_prob(same)
        some = head.log_prob(hidden, torch.tensor([1, 0, 5]), mask=MASK)
    assert (got[..., ~MASK] == -torch.inf).all()
    torch.testing.assert_close(got[..., MASK], want)
    assert torch.equal(some[..., 1], torch.full((2, 5), -torch.inf, dtype=torch.float64))
    torch.testing.assert_close(some[..., [0, 2]], got[..., [1, 5]])
    if recorded:
        slope = torch.autograd.grad(got[..., MASK].square().sum(), [hidden, head.weight])
        wanted = torch.autograd.grad(want.square().sum(), [same, few.weight])
        torch.testing.assert_close(slope[0], wanted[0])
        torch.testing.assert_close(slope[1][MASK], wanted[1])
        assert not slope[1][~MASK].any()
        slope = torch.autograd.grad(some[..., [0, 2]].sum(), [hidden, head.weight])
        assert slope[0].isfinite().all() and not slope[1][~MASK].any()


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize(("loss", "engine"), ENGINES)
def test_the_best_classes_are_those_of_the_other_classes(loss, prior, engine):
    head = layer(loss, PRIORS[prior], engine)
    few, classes = alone(head, PRIORS[prior]), MASK.nonzero().squeeze(1)
    hidden = torch.randn(6, d, dtype=torch.float64)
    got, want = head.topk(hidden, 3, mask=MASK), few.topk(hidden, 3)
    torch.testing.assert_close(got.values, want.values)
    assert torch.equal(got.indices, classes[want.indices])
    assert torch.equal(head.predict(hidden, mask=MASK), classes[few.predict(hidden)])
    target = torch.arange(6)
    assert torch.equal(head.rank(hidden, classes[target], mask=MASK), few.rank(hidden, target))
    exclude = got.indices[:, :1]
    rest = head.topk(hidden, 2, exclude=exclude, mask=MASK)
    assert torch.equal(rest.indices, got.indices[:, 1:])


def test_classes_that_are_masked_out_come_last():
    head = layer("taylor_softmax", None)
    values, indices = head.topk(torch.randn(3, d, dtype=torch.float64), D, mask=MASK)
    n = int(MASK.sum())
    assert MASK[indices[:, :n]].all() and values[:, :n].isfinite().all()
    assert (values[:, n:] == -torch.inf).all()


def test_a_masked_twin_with_a_larger_prior_is_not_better():
    prior = torch.arange(1.0, D + 1)
    head = LinearSphericalLoss(d, D, prior=prior)
    with torch.no_grad():
        head.weight[1:] = head.weight[:1].clone()
        head.bias[1:] = head.bias[:1].clone()
    mask = torch.arange(D) < 20
    assert head.rank(torch.randn(1, d), torch.tensor([18]), mask=mask).item() == 2


def test_sampled_softmax_predicts_among_some_classes():
    head = SampledSoftmaxLoss(d, D, 10)
    hidden = torch.randn(3, d)
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    want = SphericalLoss("softmax").log_prob(logits, mask=MASK)
    torch.testing.assert_close(head.log_prob(hidden, mask=MASK), want)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("kind", WITHOUT)
def test_other_layers_refuse_a_mask(kind, name):
    with pytest.raises(TypeError, match=r"mask cannot be used .* LinearSphericalLoss"):
        getattr(WITHOUT[kind](), name)(torch.zeros(2, d), **PREDICTIONS[name], mask=MASK)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (MASK[1:], r"mask must have shape \(37,\)"),
        (MASK.expand(2, D), "a mask for each row needs the logits"),
        (MASK.float(), "mask must be a boolean tensor"),
    ],
)
def test_a_wrong_mask_is_named(name, mask, words):
    head = LinearSphericalLoss(d, D)
    with pytest.raises((TypeError, ValueError), match=words):
        getattr(head, name)(torch.zeros(2, d), **PREDICTIONS[name], mask=mask)


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_mask_without_classes_is_refused(name):
    mask = torch.zeros(D, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one class"):
        getattr(LinearSphericalLoss(d, D), name)(torch.zeros(2, d), **PREDICTIONS[name], mask=mask)


@pytest.mark.once("values are checked on a CPU alone")
def test_the_rank_of_a_class_that_is_masked_out_is_refused():
    with pytest.raises(ValueError, match="target must be a class that takes part"):
        LinearSphericalLoss(d, D).rank(torch.zeros(2, d), torch.tensor([1, 3]), mask=MASK)
