"""Steps of a stack that cannot be taken, and products with its gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from _stacks import CLUSTER, STARTS, D, d, dense_stack_gradient, measure
from _stacks import random_stack_gradient as random_gradient
from softsphere.matrix.factored_stack import FactoredStack
from softsphere.matrix.stack_step import Increments
from softsphere.matrix.update import SingularStepError


def stack(prior: bool = False, dtype: torch.dtype = torch.float64) -> FactoredStack:
    """A stack that has taken some steps."""
    torch.manual_seed(0)
    pi = measure(0).to(dtype) if prior else None
    W = FactoredStack(torch.randn(D, d, dtype=dtype), starts=STARTS, pi=pi)
    for seed in range(3):
        W.add_(random_gradient(9, seed), alpha=-0.02, decay=0.1)
    W.mend_()
    return W


def state(W: FactoredStack) -> dict[str, torch.Tensor]:
    names = ("U", "U_inv", "omega", "centred_gram", "colsum", "scale", "old")
    arrays = {name: getattr(W.arrays, name).clone() for name in names}
    return {**arrays, "W": W.arrays.to_dense()}


def singular(g, W):
    """T = I − lr A is singular for the matrix of the first factor alone."""
    return replace(g, L=g.H / g.H.square().sum(1, keepdim=True)), 1.0


def not_finite(g, W):
    s = g.s.clone()
    s[-1] = torch.nan
    return replace(g, s=s), 1.0


def overflowing(g, W):
    return replace(g, s=g.s * 1e30), 1e30


BAD = {
    "singular": (singular, "singular .* lower lr"),
    "not finite": (not_finite, "not finite; look for an overflow"),
    "overflow": (overflowing, "squares overflow in torch.float32"),
}


@pytest.mark.parametrize("many", [1, 20])
@pytest.mark.parametrize("name", BAD)
def test_a_step_that_cannot_be_taken_changes_nothing(name, many):
    W = stack(dtype=torch.float32)
    spoil, words = BAD[name]
    fine = random_gradient(many, 5, crowded=True)
    if name == "singular":
        # one factor in a matrix of its own, beside factors of others that could be taken
        fine = random_gradient(1, 5)
    g, lr = spoil(fine, W)
    g = random_gradient(7, 6, crowded=True) * 1e-3 + g if name == "not finite" else g
    before = state(W)
    with pytest.raises(SingularStepError, match=words):
        W.add_(g, alpha=-lr)
    torch.testing.assert_close(state(W), before, rtol=0, atol=0)
    W.add_(random_gradient(5, 7), alpha=-0.01)  # and it can go on


@pytest.mark.parametrize("decay", [1.0, float("nan")])
def test_a_decay_that_cannot_be_is_refused(decay):
    W = stack()
    before = state(W)
    with pytest.raises(SingularStepError, match="weight_decay"):
        W.add_(random_gradient(3, 0), alpha=-0.1, decay=decay)
    torch.testing.assert_close(state(W), before, rtol=0, atol=0)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("crowded", [False, True])
def test_products_of_gradients_are_those_of_dense_ones(prior, crowded):
    W = stack(prior)
    dense, Pi = W.arrays.to_dense(), (measure(0) if prior else torch.ones(D).double()).unsqueeze(1)
    one = replace(random_gradient(11, 1, crowded), rho=0.3)
    two = random_gradient(30, 2, crowded) * 0.5 + random_gradient(2, 3)
    G, F = dense_stack_gradient(dense, one), dense_stack_gradient(dense, two)
    torch.testing.assert_close(W.to_dense_gradient(one), G)
    torch.testing.assert_close(W.to_dense_gradient(two), F)
    torch.testing.assert_close(W.dot(one, two), (G * Pi * F).sum())
    torch.testing.assert_close(W.dot(two, one), (G * Pi * F).sum())
    torch.testing.assert_close(W.norm(one), (G * Pi * G).sum().sqrt())
    torch.testing.assert_close(W.arrays.squares(), (Pi * dense.square()).sum(0))


def test_a_step_that_leaves_next_to_nothing_of_a_direction_loses_no_digits():
    torch.manual_seed(0)
    dense = torch.randn(D, d, dtype=torch.float64)
    W = FactoredStack(dense.float(), starts=STARTS)
    dense = dense.float().double()
    for seed in range(40):
        g = random_gradient(1, seed)
        # what is left of the direction of H: one part in a thousand
        L = g.H * (0.999 / g.H.square().sum(1, keepdim=True))
        g = replace(g, L=L)
        dense = dense - dense_stack_gradient(dense, g)
        W.add_(g, alpha=-1.0)
    error = (W.arrays.to_dense() - dense).norm() / dense.norm()
    assert error < 20 * torch.finfo(torch.float32).eps


def test_starts_that_cannot_be_are_refused():
    rows = torch.zeros(5, 2)
    for starts in ([0, 3], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="starts must ascend from 0 to the 5 rows"):
            FactoredStack(rows, starts=torch.tensor(starts))
    with pytest.raises(TypeError, match=r"starts must be a \(C \+ 1\) tensor of integers"):
        FactoredStack(rows, starts=torch.tensor([0.0, 5.0]))
    with pytest.raises(TypeError, match="weight must be"):
        FactoredStack(rows.half(), starts=torch.tensor([0, 5]))


def test_the_cluster_of_each_row():
    assert torch.equal(stack().arrays.cluster_of(torch.arange(D)), CLUSTER)


def test_increments_without_a_first_factor_are_those_with_the_identity():
    W, ids, kappa = stack().arrays, torch.tensor([1, 2]), 0.7
    chosen = torch.tensor([False, True])
    left, right, added = torch.randn(3, 2, d, d, dtype=torch.float64)
    rest = {"half": (left, right), "vectors": {}, "share": torch.ones(2)}
    eye = torch.eye(d, dtype=torch.float64).expand(2, d, d)
    short, long = (
        Increments(ids, {"U": (left, right), "U_inv": (first, added)}, **rest)
        for first in (None, eye)
    )
    for one, two in zip(short.all().values(), long.all().values(), strict=True):
        torch.testing.assert_close(one, two)
    for name in ("U", "U_inv"):
        after = short.after(W, name, kappa, chosen)
        torch.testing.assert_close(after, long.after(W, name, kappa, chosen))
    kept = right.clone()
    T = short.maps(kappa, chosen)
    torch.testing.assert_close(T, long.maps(kappa, chosen))
    torch.testing.assert_close(T[0], kappa * eye[0] + right[1])
    assert torch.equal(right, kept)
