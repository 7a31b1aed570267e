"""A small matrix is the sum of what was added to it, whichever part of it has the sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from softsphere import FactoredSphericalLoss
from softsphere.matrix import small_matrix
from softsphere.matrix.small_matrix import SmallMatrix
from softsphere.optim import FactoredSGD

w = 3
apart = pytest.mark.once("increments are summed apart on a CPU alone")
STEPS = ["add", "settle", "put", "copy", "round"]


@apart
@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=60), st.integers(0, 1000))
@example(["add", "round", "put", "add", "round", "settle", "add", "round"], 0)
def test_it_is_the_sum_whatever_is_done_to_it(steps, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(size=1.0):
        return size * torch.randn(w, w, generator=generator, dtype=torch.float64)

    exact = draw()
    matrix, added = SmallMatrix(exact.clone()), 0.0
    for step in steps:
        if step == "add":
            x = draw(1e-3).float()
            exact = exact + x
            added += float(x.norm())
            matrix.add(x.clone())
        elif step == "settle":
            matrix.settle()
        elif step == "put":
            exact = draw()
            memory = matrix.S.data_ptr()
            matrix.put(exact)
            assert matrix.S.data_ptr() == memory  # which a captured step reads
        elif step == "copy":
            matrix.add(torch.zeros(w, w))
            old, matrix = matrix, matrix.copied(torch.device("cpu"))
            assert [x.tolist() for x in matrix.parts] == [x.tolist() for x in old.parts]
            old.put(torch.full((w, w), torch.nan))
        else:
            near = sum(matrix.rounded_parts(torch.float32)).float()
            torch.testing.assert_close(near, exact.float(), rtol=3e-7, atol=1e-6 * added)
        # rounding errors are those of the increments, never of the whole
        torch.testing.assert_close(matrix.value, exact, rtol=1e-14, atol=1e-6 * added)
        torch.testing.assert_close(matrix.diagonal, matrix.value.diagonal(), rtol=0, atol=0)


@apart
def test_small_increments_are_not_lost_beside_a_large_matrix():
    matrix = SmallMatrix(torch.full((1, 1), 1e6, dtype=torch.float64))
    for _ in range(1000):
        matrix.add(torch.full((1, 1), 1e-4))
    assert float(matrix.value) - 1e6 == pytest.approx(0.1, rel=1e-6)


@apart
@pytest.mark.parametrize("same", [False, True], ids=["new batches", "one batch"])
def test_a_sum_has_no_larger_errors_than_its_increments_have(same):
    generator = torch.Generator().manual_seed(0)
    matrix = SmallMatrix(torch.eye(64, dtype=torch.float64))
    summed, exact = 0, 0
    for i in range(15):
        if i == 0 or not same:
            a, b = torch.randn(2, 64, 16, generator=generator)
        increment = a @ b.mT
        summed, exact = summed + increment.double(), exact + a.double() @ b.double().mT
        matrix.add(increment.clone())
    assert (matrix.L - summed).norm() <= 3 * (summed - exact).norm()


@apart
def test_a_matrix_that_shrinks_keeps_its_digits(monkeypatch):
    """Rounding errors are in proportion to the matrix as it was when L began."""
    found = []
    for most in (small_matrix._MOST, 1):
        monkeypatch.setattr(small_matrix, "_MOST", most)
        torch.manual_seed(0)
        head = FactoredSphericalLoss(16, 50, "squared_error", bias=False)
        # every step takes about a seventh of all directions away
        optimizer, Q = (
            FactoredSGD(head.parameters(), lr=0.07),
            torch.linalg.qr(torch.randn(16, 16)).Q,
        )
        worst, W = 0.0, head.weight.matrix.arrays
        for _ in range(200):
            optimizer.zero_grad()
            head(4 * Q + 0.02 * torch.randn(16, 16), torch.randint(50, (16,))).backward()
            optimizer.step()
            lengths = W.U.norm(dim=1, keepdim=True)
            back = W.U / lengths @ (W.U_inv * lengths.mT)
            worst = max(worst, float((back - torch.eye(16)).norm()))
        found.append(worst)
    assert found[0] <= 2.5 * found[1]


def test_looking_at_a_layer_changes_none_of_its_steps():
    """Reading the matrices must not change which of their increments are summed apart."""
    found = []
    for looks in (False, True):
        torch.manual_seed(0)
        head = FactoredSphericalLoss(6, 50)
        optimizer = FactoredSGD(head.parameters(), lr=1e-3)
        for _ in range(40):
            optimizer.zero_grad()
            head(torch.randn(4, 6), torch.randint(50, (4,))).backward()
            optimizer.step()
            if looks:
                W = head.weight.matrix.arrays
                seen = W.U, W.U_inv, W.centred_gram, W.gram, W.diagonal("U"), W.small("U_inv")
                assert all(bool(x.isfinite().all()) for x in seen)
                assert head.health().gram_drift < 1e-5
        found.append(head.weight.matrix.arrays.state())
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name


@apart
def test_increments_of_a_step_are_summed_apart_unless_all_is_scaled():
    for decay in (0.0, 0.01):
        head = FactoredSphericalLoss(6, 50)
        optimizer = FactoredSGD(head.parameters(), lr=1e-3, weight_decay=decay)
        for _ in range(6):  # a step that a measurement follows settles
            optimizer.zero_grad()
            head(torch.randn(4, 6), torch.randint(50, (4,))).backward()
            optimizer.step()
        matrices = head.weight.matrix.arrays.matrices
        apart = {name for name, matrix in matrices.items() if matrix.L is not None}
        assert apart == (set() if decay else {"U", "U_inv", "centred_gram"})
