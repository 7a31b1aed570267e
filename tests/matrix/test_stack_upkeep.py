"""The upkeep of a stack of matrices: what it costs, and what it mends."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from softsphere.matrix.factored_stack import FactoredStack
from softsphere.matrix.gradient import GradientFactors

C, d = 5, 8


def worn(
    size: int, steps: int, dtype: torch.dtype = torch.float64, meter: Any = None
) -> FactoredStack:
    """A stack after steps that each shrink directions by a half; the first 20 rows are targets.

    The steps, with their upkeep, are taken inside the context `meter`.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W = FactoredStack(normal(C * size, d).to(dtype), starts=torch.arange(C + 1) * size)
    W.arrays.sums()
    generator.manual_seed(1)
    with meter or contextlib.nullcontext():
        for _ in range(steps):
            H, cluster = normal(6, d), torch.randint(C, (6,), generator=generator)
            place = torch.randint(20, (6,), generator=generator)
            L = H * (0.5 / H.square().sum(1, keepdim=True))
            rows = cluster * size + place
            g = GradientFactors(H, L, normal(6), rows, None, normal(6), cluster=cluster)
            W.add_(g, alpha=-1.0)
    return W


def test_mending_costs_nothing_in_rows_that_are_no_targets():
    spent, done = [], []
    for size in (40, 20_000):
        counter = FlopCounterMode(display=False)
        done.append(worn(size, 12, meter=counter).watch.done)
        spent.append(counter.get_total_flops())
    assert done[0] == done[1]
    assert done[0]["renewed"] > C
    assert done[0]["refactorised"] == 0
    assert spent[1] == spent[0] > 0


def test_the_factors_stay_fit():
    W = worn(40, 150, torch.float32)
    assert W.watch.done["renewed"] > 10 * C
    health = W.health()
    assert health.condition < 4
    assert health.inverse_drift < 1e-10
    assert health.gram_drift < 1e-4
    assert health.shift < 8


def test_a_shift_that_has_outgrown_the_rows_is_written_into_them():
    """Every row is a target, which undoes what is added to all of them."""
    torch.manual_seed(0)
    dense = torch.randn(4, d, dtype=torch.float64)
    W = FactoredStack(dense.clone(), starts=torch.tensor([0, 4]))
    for _ in range(200):
        H = torch.randn(1, d, dtype=torch.float64).expand(4, -1).contiguous()
        s, x = torch.full((4,), 0.25), torch.full((4,), -1.0)
        nothing, cluster = torch.zeros_like(H), torch.zeros(4, dtype=torch.long)
        rows = torch.arange(4)
        g = GradientFactors(H, nothing, s.double(), rows, None, x.double(), cluster=cluster)
        W.add_(g * 3.0)
    assert W.watch.done["refactorised"] > 0
    assert W.health().shift < 8 * 2
    torch.testing.assert_close(W.arrays.to_dense(), dense, rtol=0, atol=1e-11)


def test_sums_that_have_drifted_are_computed_again():
    W = worn(40, 3)
    W.arrays.centred_gram[2] *= 1.01
    W.mend_()
    assert W.watch.done["regrammed"] == 0  # not yet
    W.watch.since_gram.fill_(1_000.0)
    W.mend_()
    assert W.watch.done["regrammed"] == 1
    assert W.health().gram_drift < 1e-9
