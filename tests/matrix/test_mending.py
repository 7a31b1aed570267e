"""Mending the factors changes no number of the matrix."""

from __future__ import annotations

import pytest
import torch

from _gradients import D, d, random_gradient
from softsphere.matrix.factored_matrix import FactoredMatrix


@pytest.mark.parametrize("means", ["refactorise_", "canonical_", "mend_", "renew_"])
def test_mending_leaves_the_matrix(means):
    W = FactoredMatrix(torch.randn(D, d).double())
    for seed in range(5):
        W.add_(random_gradient(3, 4, seed), alpha=-0.1, decay=0.01)
    before, gram = W.arrays.to_dense(), W.arrays.gram.clone()
    getattr(W, means)()
    torch.testing.assert_close(W.arrays.to_dense(), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(W.arrays.gram, gram)
