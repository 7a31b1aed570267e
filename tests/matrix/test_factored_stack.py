"""FactoredStack beside a dense twin, under any order of operations."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from _gradients import in_dtype
from _stacks import CLUSTER, SIZES, STARTS, D, d, dense_stack_gradient, measure
from _stacks import random_stack_gradient as random_gradient
from softsphere.matrix.factored_stack import FactoredStack
from softsphere.matrix.stack_mending import recompute_sums, renew_coordinates, stack_directions


def each_matrix(values: torch.Tensor) -> torch.Tensor:
    """Sums of rows over each matrix."""
    return torch.zeros(len(SIZES), *values.shape[1:]).double().index_add_(0, CLUSTER, values)


class Machine(RuleBasedStateMachine):
    """Steps, mending, saving, moving between dtypes, in any order, beside a dense W."""

    @initialize(prior=st.booleans(), seed=st.integers(0, 99))
    def start(self, prior, seed):
        torch.manual_seed(seed)
        pi = measure(seed) if prior else None
        self.Pi = torch.ones(D, 1).double() if pi is None else pi.unsqueeze(1)
        self.dense = torch.randn(D, d).double()
        self.W = FactoredStack(self.dense.clone(), starts=STARTS, pi=pi)
        self.rough, self.lent = False, None

    @property
    def tolerance(self):
        return 2e-4 if self.rough else 1e-9

    @rule(
        m=st.integers(1, 30),
        seed=st.integers(0, 999),
        decay=st.sampled_from([0.0, 0.05]),
        scale=st.sampled_from([0.02, 0.1]),
        crowded=st.booleans(),
        rho=st.sampled_from([0.0, 0.3]),
    )
    def step(self, m, seed, decay, scale, crowded, rho):
        g = replace(random_gradient(m, seed, crowded), rho=rho) * scale
        G = dense_stack_gradient(self.dense, g)
        self.W.add_(in_dtype(g, self.W.arrays.dtype), alpha=-1.0, decay=decay)
        self.dense = (1 - decay) * self.dense - G

    @rule(factor=st.sampled_from([0.5, -2.0]))
    def scale(self, factor):
        self.W.scale_(0, factor)
        self.dense = self.dense * factor

    @rule(means=st.sampled_from(["mend_", "renew", "refactorise_", "canonical_", "regram"]))
    def mend(self, means):
        W = self.W.arrays
        if means == "renew":
            ids = torch.tensor([0, 2, 3, 6])
            renew_coordinates(W, ids, stack_directions(W.of("U", ids)))
        elif means == "regram":
            recompute_sums(W, torch.tensor([1, 3]))
        else:
            getattr(self.W, means)()

    @rule()
    def save_and_load(self):
        self.W.canonical_()
        lent = self.W.arrays.V.lend(0)
        other = self.W.like([lent.clone()], self.W.arrays.pi)
        assert torch.equal(other.arrays.to_dense(), self.W.arrays.to_dense())
        assert torch.equal(other.arrays.centred_gram, self.W.arrays.centred_gram)
        self.W, self.lent = other, (lent, lent.clone())

    @rule(factor=st.sampled_from([0.5, -2.0]))
    def rewrite(self, factor):
        self.W.rewrite_(0, lambda part, rows: rows * factor)
        self.dense = self.dense * factor

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def change_dtype(self, dtype):
        self.rough |= dtype == torch.float32
        self.W = self.W.copied(0, self.W.device, dtype)

    @invariant()
    def is_its_twin(self):
        if not hasattr(self, "W"):
            return
        W, scale = self.W.arrays, self.dense.abs().max()
        near = {"rtol": 0, "atol": float(self.tolerance * (1 + scale) ** 2 * D)}
        torch.testing.assert_close(W.to_dense().double(), self.dense, **near)
        some = torch.tensor([0, 7, 7, D - 1, 6, 5])
        torch.testing.assert_close(W.rows(some).double(), self.dense[some], **near)
        squares = each_matrix(self.dense.unsqueeze(2) * (self.Pi * self.dense).unsqueeze(1))
        ids, mean = W.all_ids(), W.mean(W.all_ids())
        gram = W.of("centred_gram", ids)
        gram = gram + W.mass.reshape(-1, 1, 1) * mean.unsqueeze(2) * mean.unsqueeze(1)
        torch.testing.assert_close(gram, squares, **near)
        torch.testing.assert_close(W.of("colsum", ids), each_matrix(self.Pi * self.dense), **near)
        if self.lent is not None:  # what was handed out is what it was
            assert torch.equal(*self.lent)
        U, U_inv = W.of("U", ids), W.of("U_inv", ids)
        lengths = U.norm(dim=2, keepdim=True)
        eye = torch.eye(d).double().expand_as(U)
        back = (U @ U_inv) * lengths.mT / lengths
        torch.testing.assert_close(back, eye, rtol=0, atol=self.tolerance)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
