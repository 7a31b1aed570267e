"""A step that leaves next to nothing of a direction of W, where nobody looks at it before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from _recorded_graph import pretend_a_gpu
from softsphere import FactoredSphericalLoss
from softsphere.captured import check_taken
from softsphere.matrix import abstract
from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.wear import kappa
from softsphere.optim import FactoredSGD

D, d = 300, 16


class Pair:
    """A float32 matrix, and the same steps of explicit arithmetic in float64."""

    def __init__(self):
        torch.manual_seed(0)
        V = torch.randn(D, d)
        self.numbers = torch.Generator().manual_seed(1)
        self.mine, self.explicit = FactoredMatrix(V.clone()), V.double()

    def step(self, h, taken, x):
        """Takes a share of the direction h (d) away from all rows, and adds x h to some rows."""
        rows = torch.randint(D, (len(x),), generator=self.numbers)
        H = torch.cat([h.unsqueeze(0)] * len(x))
        L = torch.zeros_like(H)
        L[0] = taken * h / h.square().sum()
        self.mine.add_(GradientFactors(H, L, torch.zeros(len(x)), rows, None, x), -1.0)
        step = self.explicit @ L.double().mT @ H.double()
        step.index_add_(0, rows, x.double().unsqueeze(1) * H.double())
        self.explicit -= step

    def direction(self):
        return torch.randn(d, generator=self.numbers)

    def error(self):
        difference = self.mine.arrays.to_dense().double() - self.explicit
        return float(difference.norm() / self.explicit.norm())


def error_after(share: float) -> float:
    """Calm steps, one that leaves a share of a direction, and steps near that direction."""
    pair = Pair()
    for _ in range(60):
        pair.step(pair.direction(), 1e-3, torch.tensor([1e-2]))
    h = pair.direction()
    pair.step(h, 1 - share, torch.tensor([0.3, 0.4]))
    for _ in range(30):
        pair.step(h + 0.1 * pair.direction(), 1e-3, torch.ones(1))
    arrays = pair.mine.arrays
    arrays.check()
    assert kappa(arrays.U, arrays.U_inv) <= 32
    return pair.error()


@pytest.mark.once("the matrix is told that it is on a GPU")
@pytest.mark.parametrize("share", [0.1, 1e-2, 1e-4, 1e-6])
def test_a_harsh_step_costs_no_digits_on_a_gpu_either(share, monkeypatch):
    on_cpu = error_after(share)
    pretend_a_gpu(monkeypatch)
    as_on_gpu = error_after(share)
    assert on_cpu < 3e-7
    # half a unit of the last place, 32 times as large
    assert as_on_gpu <= 16 * torch.finfo(torch.float32).eps


READERS = {
    "the loss": lambda head, hidden: head(hidden, torch.tensor([0, 3])),
    "log_prob": lambda head, hidden: head.log_prob(hidden),
    "predict": lambda head, hidden: head.predict(hidden),
    "dense": lambda head, hidden: head.dense(),
    "state_dict": lambda head, hidden: head.state_dict(),
    "a copy": lambda head, hidden: copy.deepcopy(head),
    "a pickle": lambda head, hidden: pickle.dumps(head),
    "another dtype": lambda head, hidden: head.double(),
    "rows": lambda head, hidden: head.weight[torch.tensor([0, 3])],
    "a norm": lambda head, hidden: head.weight.norm(),
    "in place": lambda head, hidden: head.weight.data.mul_(0.5),
    "health": lambda head, hidden: head.matrix.health(),
    "mending": lambda head, hidden: head.matrix.mend_(),
    "renewing": lambda head, hidden: head.matrix.renew_(),
    "writing anew": lambda head, hidden: head.matrix.refactorise_(),
    "check": lambda head, hidden: check_taken([head.optimizer]),
}


@pytest.mark.once("the matrix is told that it is on a GPU")
@pytest.mark.parametrize("reader", READERS)
def test_what_a_step_may_leave_undone_is_done_before_anything_reads_it(reader, monkeypatch):
    pretend_a_gpu(monkeypatch)
    torch.manual_seed(0)
    head = FactoredSphericalLoss(d, D, dtype=torch.float64)
    optimizer = head.optimizer = FactoredSGD(head.parameters(), lr=0.1)
    hidden, target = torch.randn(2, d, dtype=torch.float64), torch.tensor([0, 3])
    matrix = head.matrix
    for _ in range(3):
        optimizer.zero_grad()
        head(hidden, target).backward()
        optimizer.step()
    matrix.watch.period = 100  # no measurement finds it
    h = torch.randn(1, matrix.arrays.width, dtype=torch.float64)
    L, x = (1 - 1e-5) * h / h.square().sum(), torch.zeros(1, dtype=torch.float64)
    matrix.add_(GradientFactors(h, L, x, target[:1], None, x), -1.0)
    assert matrix.watch.undone.any()
    READERS[reader](head, hidden)
    assert not matrix.watch.undone.any()


@pytest.mark.once("the matrix is told that it is on a GPU")
def test_a_capture_that_would_have_to_wait_for_a_step_is_refused_in_words(monkeypatch):
    pretend_a_gpu(monkeypatch)
    pair = Pair()
    pair.step(pair.direction(), 1e-3, torch.ones(1))
    pair.mine.watch.period = 100
    pair.step(pair.direction(), 1e-3, torch.ones(1))
    with monkeypatch.context() as patch:
        patch.setattr(abstract, "graph_is_captured", lambda: True)
        with pytest.raises(RuntimeError, match="read the weight once before the capture"):
            pair.mine.arrays.check()
    pair.mine.arrays.check()
    with monkeypatch.context() as patch:
        patch.setattr(abstract, "graph_is_captured", lambda: True)
        pair.mine.arrays.check()
    assert pair.error() < 3e-7
