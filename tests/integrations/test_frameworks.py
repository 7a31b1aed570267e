"""Clustered layers, which have no dense twin, in frameworks that own the loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from _handlings_frameworks import LOOPS, by_hand
from _subject import D, Model, Subject, d
from softsphere import ClusteredLoss

pytestmark = [
    pytest.mark.once("each framework is told to use the CPU"),
    pytest.mark.filterwarnings("ignore"),
]


class Clustered(Subject):
    """A subject whose head has a shortlist and clusters."""

    def __init__(self, engine: str) -> None:
        torch.manual_seed(0)
        self.kind = "clustered"
        self.model = Model("plain").double()
        assignment = torch.arange(D) % 5 - 1
        self.model.head = ClusteredLoss(d, D, assignment, engine=engine, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(1)

    def numbers(self) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in self.model.state_dict().items()}


@pytest.mark.parametrize("engine", ["auto", "factored"])
@pytest.mark.parametrize("name", LOOPS)
def test_steps_are_those_of_a_loop_by_hand(name, engine):
    needs, run = LOOPS[name]
    pytest.importorskip(needs)
    got, want = run(Clustered(engine)), by_hand(Clustered(engine))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
