"""Gradients in factors beside dense ones, as linear algebra."""

from __future__ import annotations

import copy

import pytest
import torch

from _gradients import D, d, dense_gradient, random_gradient
from _recorded_graph import pretend_a_gpu
from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.gradient_products import EntryProducts


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize(("m", "n"), [(3, 5), (11, 7), (1, 1), (2, 0), (4, 4), (9, 9), (2, 40)])
def test_gradients_as_matrices(m, n, prior):
    torch.manual_seed(1)
    pi = torch.rand(D).double() + 0.2 if prior else None
    pi = None if pi is None else pi / pi.sum() * D
    W = FactoredMatrix(torch.randn(D, d).double(), pi=pi)
    W.add_(random_gradient(2, 3, 9), alpha=-0.1)
    dense = W.arrays.to_dense()
    one, two, P = (
        random_gradient(m, n, 0),
        random_gradient(m + 1, n + 1, 1),
        torch.randn(d, d).double(),
    )
    Pi = torch.ones(D, 1).double() if pi is None else pi.unsqueeze(1)
    cases = {
        "itself": (one, dense_gradient(dense, one)),
        "sum": (one + two, dense_gradient(dense, one) + dense_gradient(dense, two)),
        "scaled": (one * -2.5, -2.5 * dense_gradient(dense, one)),
        "right": ((one + two) @ P, (dense_gradient(dense, one) + dense_gradient(dense, two)) @ P),
        "none": (GradientFactors.zero(d, one.H) + one, dense_gradient(dense, one)),
    }
    for name, (got, want) in cases.items():
        torch.testing.assert_close(W.to_dense_gradient(got), want, msg=name)
        parts = (dense @ got.A + got.b).index_add_(0, got.rows, got.X)
        torch.testing.assert_close(parts, want, msg=name)
        torch.testing.assert_close(W.norm(got), (Pi * want * want).sum().sqrt(), msg=name)


def test_what_is_cached_in_a_gradient_changes_nothing():
    W, g = FactoredMatrix(torch.randn(D, d).double()), random_gradient(2, 3, 0)
    J = W.arrays.to_dense() @ g.L.T + g.s
    full = torch.zeros(D, 2).double()
    full.index_put_((g.rows, g.cols), g.x, accumulate=True)
    J = J + full
    dense = W.arrays.to_dense()
    back = (J - J.mean(0)).T @ (dense - dense.mean(0))
    known = GradientFactors(
        g.H, g.L, g.s, g.rows, g.cols, g.x, back, (dense - dense.mean(0))[g.rows]
    )
    other = copy.deepcopy(W)
    W.add_(g, alpha=-0.2)
    other.add_(known, alpha=-0.2)
    torch.testing.assert_close(W.arrays.gram, other.arrays.gram)
    torch.testing.assert_close(W.arrays.to_dense(), other.arrays.to_dense())


@pytest.mark.once("the matrix is told that it is on a GPU")
def test_the_ranks_of_a_sharded_matrix_add_up_in_one_order(monkeypatch):
    """Atomic additions of a GPU have any order, and each rank computes the sums for itself."""
    pretend_a_gpu(monkeypatch)
    W = FactoredMatrix(torch.randn(D, d).double()).arrays
    gradient = random_gradient(4, 30, 0)
    assert gradient.cols is not None and len(gradient.rows.unique()) < 30
    R = torch.randn(4, d).double()

    def products():
        entries = EntryProducts.of(W, gradient, d)
        return entries.of_weight, entries.e, entries.gram(gradient), entries.times(gradient, R)

    want = products()
    monkeypatch.setattr(W, "shards", object())

    def atomic(*_):
        raise AssertionError("the order of these sums is one of chance")

    monkeypatch.setattr(torch.Tensor, "index_add_", atomic)
    for found, same in zip(products(), want, strict=True):
        torch.testing.assert_close(found, same)
