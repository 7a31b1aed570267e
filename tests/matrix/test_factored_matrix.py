"""FactoredMatrix beside a dense twin, under any order of operations."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from _gradients import D, d, dense_gradient, in_dtype, random_gradient
from softsphere.matrix.abstract import Block
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.factored_matrix import FactoredMatrix


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
        g = random_gradient(m, n, seed) * (scale / m)
        G = dense_gradient(self.dense[:, :d], g)
        g = in_dtype(g, self.W.arrays.V.dtype)
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
TestMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
