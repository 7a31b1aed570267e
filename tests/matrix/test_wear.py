"""How the wear of the factors is measured."""

from __future__ import annotations

import pytest
import torch

from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.factored_stack import FactoredStack
from softsphere.matrix.wear import probes_of

d = 6
MATRICES = {
    "one matrix": FactoredMatrix,
    "a stack": lambda V: FactoredStack(V, starts=torch.tensor([0, len(V)])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("common", [0.0, 300.0])
def test_drift_of_the_gram_matrix_is_seen_beside_a_large_common_row(common, dtype):
    torch.manual_seed(0)
    matrix = FactoredMatrix((common + 0.1 * torch.randn(500, 6)).to(dtype))
    W = matrix.arrays
    assert matrix.health().gram_drift < 1e-6
    W.scale("centred_gram", 1 + 1e-3)
    W.changed()
    assert matrix.health().gram_drift == pytest.approx(1e-3, rel=0.01)
    matrix.watch.mend_gram(W)
    assert matrix.health().gram_drift < 1e-6
    assert matrix.health().regrammed == 1


def test_rows_that_are_all_equal_have_no_drift():
    matrix = FactoredMatrix(torch.full((40, 3), 1e4) + torch.tensor([0.1, 0.2, 0.3]))
    assert not matrix.arrays.centred_gram.any()
    assert matrix.health().gram_drift < 1e-12


def across(vectors: torch.Tensor) -> torch.Tensor:
    """A unit vector that is orthogonal to all columns."""
    return torch.linalg.qr(vectors, mode="complete").Q[:, -1]


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("array", ["U_inv", "centred_gram"])
def test_drift_that_the_first_random_vectors_do_not_see_is_mended(kind, array):
    torch.manual_seed(0)
    V = torch.randn(500, d, dtype=torch.float64)
    matrix = MATRICES[kind](V)
    W = matrix.arrays
    assert W.centred_gram.any()  # which computes the sums
    kept = W.matrix(array).S if kind == "one matrix" else getattr(W, array)
    unseen = across(probes_of(d, 2 if array == "U_inv" else 1, 0, V.device))
    kept.view(d, d).add_(torch.outer(unseen, unseen), alpha=1e-3 * float(kept.max()))
    if kind == "one matrix":
        W.changed()
        matrix.watch.since_gram = 1_000
    else:
        matrix.watch.since_gram.fill_(1_000.0)
    matrix.mend_()
    done = matrix.watch.done
    assert done["regrammed"] == (array == "centred_gram")
    assert done["renewed"] + done["reinverted"] == (array == "U_inv")


@pytest.mark.parametrize("kind", MATRICES)
def test_the_gram_matrix_of_a_million_short_rows_keeps_its_digits(kind):
    torch.manual_seed(0)
    V = torch.randn(1_000_000, 1) + 0.1 * torch.randn(1_000_000, 2)
    found = MATRICES[kind](V.clone()).arrays.centred_gram.view(2, 2)
    centred = V.double() - V.double().mean(0)
    torch.testing.assert_close(found, centred.mT @ centred, rtol=1e-5, atol=0)
