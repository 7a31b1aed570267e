"""FactoredMatrix and the factors of gradients beside dense twins, as linear algebra."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from softsphere.matrix import SingularStepError
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.factored_matrix import Block, FactoredMatrix
from softsphere.matrix.gradient import GradientFactors

D, d = 23, 4


def gradient(m: int, n: int, seed: int, width: int = d, rows: int = D) -> GradientFactors:
    """Random factors in float64; several entries in one place and in one row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    H = normal(m, width) * torch.logspace(0, -1, width, dtype=torch.float64)
    q = torch.rand(m, 1, generator=generator).double()
    t = torch.randint(rows, (n,), generator=generator) // 2
    # one entry a column has a form of its own
    cols = None if n == m else torch.randint(m, (n,), generator=generator)
    return GradientFactors(H, q * H, normal(m), t, cols, normal(n))


def cast(g: GradientFactors, dtype: torch.dtype) -> GradientFactors:
    H, L, s, x = (part.to(dtype) for part in (g.H, g.L, g.s, g.x))
    return GradientFactors(H, L, s, g.rows, g.cols, x)


def dense_gradient(W: torch.Tensor, g: GradientFactors) -> torch.Tensor:
    """G by explicit loops."""
    J = W @ g.L.T + g.s
    for t, i, x in zip(g.rows.tolist(), g.columns().tolist(), g.x.tolist(), strict=True):
        J[t, i] += x
    return J @ g.H


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize(("m", "n"), [(3, 5), (11, 7), (1, 1), (2, 0), (4, 4), (9, 9), (2, 40)])
def test_gradients_as_matrices(m, n, prior):
    torch.manual_seed(1)
    pi = torch.rand(D).double() + 0.2 if prior else None
    pi = None if pi is None else pi / pi.sum() * D
    W = FactoredMatrix(torch.randn(D, d).double(), pi=pi)
    W.add_(gradient(2, 3, 9), alpha=-0.1)
    dense = W.arrays.to_dense()
    one, two, P = gradient(m, n, 0), gradient(m + 1, n + 1, 1), torch.randn(d, d).double()
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


def test_gradients_of_different_width_do_not_add_up():
    with pytest.raises(ValueError, match="same width, got 4 and 3"):
        gradient(2, 2, 0) + gradient(2, 2, 0, width=3)


def test_what_is_cached_in_a_gradient_changes_nothing():
    W, g = FactoredMatrix(torch.randn(D, d).double()), gradient(2, 3, 0)
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


def test_a_step_that_is_singular_or_not_finite_changes_nothing():
    W = FactoredMatrix(torch.randn(D, d).double())
    before = copy.deepcopy(W.arrays.state())
    h = torch.tensor([[2.0, 0, 0, 0]]).double()
    none = torch.empty(0, dtype=torch.long)
    singular = GradientFactors(h, h, torch.zeros(1).double(), none, none, h.new_empty(0))
    with pytest.raises(SingularStepError, match="singular"):
        W.add_(singular, alpha=-0.25)
    with pytest.raises(SingularStepError, match="not finite"):
        W.add_(gradient(2, 3, 0) * float("nan"), alpha=-0.1)
    with pytest.raises(SingularStepError, match="weight decay"):
        W.add_(gradient(2, 3, 0), decay=1.0)
    with pytest.raises(IndexError):
        W.add_(gradient(2, 3, 0, rows=5 * D), alpha=-0.1)
    for name, value in W.arrays.state().items():
        assert torch.equal(value, before[name]), name
    W.add_(singular, alpha=-0.2)


def test_harsh_steps_are_mended_at_once():
    """One step takes all but 1e-3 of a direction; float32 keeps its digits."""
    torch.manual_seed(0)
    W = FactoredMatrix(torch.randn(D, d))
    dense = W.arrays.to_dense().double()
    for seed in range(30):
        g = gradient(1, 1, seed)
        h = g.H / g.H.norm()
        g = GradientFactors(h, h, g.s, g.rows, g.cols, g.x)
        dense = dense - (1 - 1e-3) * dense_gradient(dense, g)
        W.add_(cast(g, torch.float32), alpha=-(1 - 1e-3))
    error = (W.arrays.to_dense().double() - dense).abs().max() / dense.abs().max()
    assert error < 1e-4
    assert W.health().renewed > 0


@pytest.mark.parametrize("means", ["refactorise_", "canonical_", "mend_", "renew_"])
def test_mending_leaves_the_matrix(means):
    W = FactoredMatrix(torch.randn(D, d).double())
    for seed in range(5):
        W.add_(gradient(3, 4, seed), alpha=-0.1, decay=0.01)
    before, gram = W.arrays.to_dense(), W.arrays.gram.clone()
    getattr(W, means)()
    torch.testing.assert_close(W.arrays.to_dense(), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(W.arrays.gram, gram)


class Machine(RuleBasedStateMachine):
    """Steps, momentum, mending, saving, moving between dtypes, in any order, beside a dense W."""

    @initialize(prior=st.booleans(), seed=st.integers(0, 99))
    def start(self, prior, seed):
        torch.manual_seed(seed)
        pi = torch.rand(D).double() + 0.2 if prior else None
        self.Pi = torch.ones(D, 1).double() if pi is None else (pi / pi.sum() * D).unsqueeze(1)
        self.dense = torch.randn(D, d).double()
        self.W = FactoredMatrix(self.dense.clone(), pi=None if pi is None else self.Pi.squeeze(1))
        self.rough, self.momentum, self.lent = False, None, None

    @property
    def tolerance(self):
        return 2e-4 if self.rough else 1e-9

    @rule(
        m=st.integers(1, 9),
        n=st.sampled_from([0, 1, 3, 4, 9, 30]),
        seed=st.integers(0, 999),
        decay=st.sampled_from([0.0, 0.05]),
        scale=st.sampled_from([0.02, 0.1]),
    )
    def step(self, m, n, seed, decay, scale):
        g = gradient(m, n, seed) * (scale / m)
        G = dense_gradient(self.dense[:, :d], g)
        g = cast(g, self.W.arrays.V.dtype)
        if self.W.arrays.blocks == 1:
            self.W.add_(g, alpha=-1.0, decay=decay)
            self.dense = (1 - decay) * self.dense - G
            return
        B = 0.7 * self.dense[:, d:] + G + decay * self.dense[:, :d]
        self.dense = torch.cat([self.dense[:, :d] - B, B], 1)
        self.W.transform_(g, Blocks(((1 - decay, decay), (-0.7, 0.7)), (-1.0, 1.0)))

    @precondition(lambda self: self.W.arrays.blocks == 1)
    @rule()
    def begin_momentum(self):
        self.momentum = Block(self.W)
        self.W.widen_(self.momentum, Blocks(((1.0, 0.0), (-0.7, 0.7)), (-1.0, 1.0)))
        self.dense = torch.cat([self.dense, torch.zeros(D, d).double()], 1)

    @precondition(lambda self: self.W.arrays.blocks > 1)
    @rule(keep=st.booleans())
    def part_with_momentum(self, keep):
        """It goes on as a matrix of its own, which can be put beside W again, or is forgotten."""
        B, block = self.dense[:, d:], self.momentum
        if not keep:
            self.momentum = block = None
        self.W.part_()
        self.dense = self.dense[:, :d]
        if not keep:
            return
        assert block.matrix is not self.W
        values = block.matrix.arrays.to_dense()
        near = float(self.tolerance * (1 + B.abs().max()) ** 2 * D)
        torch.testing.assert_close(values.double(), B, rtol=0, atol=near)
        self.W.widen_(block, Blocks(((1.0, 0.0), (-0.7, 0.7)), (-1.0, 1.0)), values)
        self.dense = torch.cat([self.dense, B], 1)

    @rule(means=st.sampled_from(["mend_", "renew_", "refactorise_", "canonical_"]))
    def mend(self, means):
        getattr(self.W, means)()

    @precondition(lambda self: self.W.arrays.blocks == 1)
    @rule()
    def save_and_load(self):
        self.W.canonical_()
        lent = self.W.arrays.V.lend(0)
        other = FactoredMatrix(lent.clone(), pi=self.W.arrays.pi)
        assert torch.equal(other.arrays.to_dense(), self.W.arrays.to_dense())
        assert torch.equal(other.arrays.gram, self.W.arrays.gram)
        self.W, self.lent = other, (lent, lent.clone())

    @rule(factor=st.sampled_from([0.5, -2.0]))
    def rewrite(self, factor):
        self.W.rewrite_(0, lambda part, rows: rows * factor)
        self.dense = torch.cat([self.dense[:, :d] * factor, self.dense[:, d:]], 1)

    @precondition(lambda self: self.W.arrays.blocks == 1)
    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def change_dtype(self, dtype):
        self.rough |= dtype == torch.float32
        self.W = self.W.copied(0, self.W.device, dtype)

    @invariant()
    def is_its_twin(self):
        if not hasattr(self, "W"):
            return
        W, scale = self.W, self.dense.abs().max()
        near = {"rtol": 0, "atol": float(self.tolerance * (1 + scale) ** 2 * D)}
        torch.testing.assert_close(W.arrays.to_dense().double(), self.dense, **near)
        torch.testing.assert_close(W.arrays.gram, self.dense.T @ (self.Pi * self.dense), **near)
        torch.testing.assert_close(W.arrays.colsum, (self.Pi * self.dense).sum(0), **near)
        if self.lent is not None:  # what was handed out is what it was
            assert torch.equal(*self.lent)
        lengths = W.arrays.U.norm(dim=1)
        back = W.arrays.U @ W.arrays.U_inv * lengths / lengths.unsqueeze(1)
        torch.testing.assert_close(
            back, torch.eye(len(W.arrays.U)).double(), rtol=0, atol=self.tolerance
        )


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_pivot_that_rounding_could_have_left_is_singular():
    """‖h‖² of ones is exact in any order, so S = 1 − lr ‖h‖² is 200 eps on every machine."""
    width = 512
    matrix = FactoredMatrix(torch.zeros(3, width).double())
    h, none = torch.ones(1, width).double(), torch.empty(0, dtype=torch.long)
    step = GradientFactors(h, h, h.new_zeros(1), none, none, h.new_empty(0))
    left = 200 * torch.finfo(torch.float64).eps
    with pytest.raises(SingularStepError, match="singular"):
        matrix.add_(step, alpha=-(1 - left) / width)
    matrix.add_(step, alpha=-(1 - 8 * left) / width)
