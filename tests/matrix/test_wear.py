"""How the wear of the factors is measured."""

from __future__ import annotations

import pytest
import torch

from softsphere.matrix.factored_matrix import FactoredMatrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("common", [0.0, 300.0])
def test_drift_of_the_gram_matrix_is_seen_beside_a_large_common_row(common, dtype):
    torch.manual_seed(0)
    matrix = FactoredMatrix((common + 0.1 * torch.randn(500, 6)).to(dtype))
    W = matrix.arrays
    assert matrix.health().gram_drift < 1e-6
    W.centred_gram.mul_(1 + 1e-3)
    W.changed()
    assert matrix.health().gram_drift == pytest.approx(1e-3, rel=0.01)
    matrix.watch.mend_gram(W)
    assert matrix.health().gram_drift < 1e-6
    assert matrix.health().regrammed == 1


def test_rows_that_are_all_equal_have_no_drift():
    matrix = FactoredMatrix(torch.full((40, 3), 1e4) + torch.tensor([0.1, 0.2, 0.3]))
    assert not matrix.arrays.centred_gram.any()
    assert matrix.health().gram_drift < 1e-12
