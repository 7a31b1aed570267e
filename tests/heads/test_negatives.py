"""Samplers of negatives: expected numbers, draws, reproducibility, cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import _oracle
from softsphere.heads.negatives import SAMPLES, Drawn, InBatch, sampler_of

pytestmark = pytest.mark.once("tables of samplers are made on a CPU, and moved by a layer")
D = 41
COUNTS = torch.tensor([(7 * k) % D * 10 + 1 for k in range(D)])
TARGET = torch.tensor([3, 0, 3, 40, 17])
NONE = torch.zeros(5, dtype=torch.bool)
# Weights of the samplers that draw, in plain numbers.
WEIGHTS = {
    "log_uniform": [math.log((k + 2) / (k + 1)) for k in range(D)],
    "frequency": [float(count) for count in COUNTS],
    "square root": [math.sqrt(count) for count in COUNTS],
    "uniform": [1.0] * D,
}
MADE = {
    "log_uniform": ("log_uniform", None, 1.0),
    "frequency": ("frequency", COUNTS, 1.0),
    "square root": ("frequency", COUNTS, 0.5),
    "uniform": ("frequency", COUNTS, 0.0),
}
every_drawn = pytest.mark.parametrize("name", MADE)


def drawn(name: str, n: int) -> Drawn:
    kind, counts, power = MADE[name]
    made = sampler_of(kind, D, n, counts, power)
    assert isinstance(made, Drawn)
    return made


@pytest.mark.parametrize("n", [1, 2, 7, 20, D - 1, D, D + 30])
@every_drawn
def test_expected_numbers_are_those_of_the_definition(name, n):
    want = torch.tensor(_oracle.expected_counts(WEIGHTS[name], n), dtype=torch.float64)
    got = drawn(name, n).log_expected.exp()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert got.sum().item() == pytest.approx(min(n, D), rel=1e-12)


@pytest.mark.parametrize("n", [1, 7, 20, D - 1, D, D + 30])
@every_drawn
def test_classes_come_as_often_as_is_expected(name, n):
    """Each draw is of a part of its own, so that the number of a class has a variance below ½."""
    torch.manual_seed(0)
    made, times = drawn(name, n), 1000
    found = [made.choose(TARGET, NONE, torch.float64) for _ in range(times)]
    for classes, log_expected in found[:20]:
        assert len(classes) == min(n, D)
        assert torch.equal(log_expected, made.log_expected[classes])
        assert int(classes.bincount().max()) <= 2  # at the border of two parts
    mean = torch.cat([x.classes for x in found]).bincount(minlength=D) / times
    error = 5 * math.sqrt(0.5 / times)
    torch.testing.assert_close(mean.double(), made.log_expected.exp(), rtol=0, atol=error)
    sure = made.log_expected.exp() > 1 - 1e-12
    assert (mean[made.always] == 1).all() and sure[made.always].all()


@every_drawn
def test_draws_are_those_of_the_seed(name):
    made, pairs = drawn(name, 10), []
    for _ in range(2):
        torch.manual_seed(5)
        pairs.append([made.choose(TARGET, NONE, torch.float64).classes for _ in range(3)])
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
    assert not torch.equal(pairs[0][0], pairs[0][1])


def test_the_ends_of_the_distribution_are_classes(monkeypatch):
    """Also for the smallest and the largest random number, whose sums may be rounded."""
    for n in (1, 20, 2000):
        made = sampler_of("log_uniform", 5000, n, None, 1.0)
        for value in (0.0, 1 - 2**-53):
            monkeypatch.setattr(torch, "rand", lambda *s, v=value, **k: torch.full(s, v, **k))
            classes = made.choose(TARGET, NONE, torch.float64).classes
            assert int(classes.min()) >= 0 and int(classes.max()) < 5000
            always = set(made.always.tolist())
            assert not always & set(classes[len(always) :].tolist())
        monkeypatch.undo()


def test_the_rarest_classes_may_be_always_negatives_and_the_last_one_drawn():
    """With counts in any order, as classes are."""
    counts = torch.tensor([1, 1, 1000, 1, 1000, 1000])
    made = sampler_of("frequency", 6, 4, counts, 1.0)
    assert sorted(made.always.tolist()) == [2, 4, 5]
    assert set(
        torch.cat([made.choose(TARGET, NONE, torch.float64).classes for _ in range(99)]).tolist()
    ) == set(range(6))


@pytest.mark.parametrize("name", ["frequency", "in_batch"])
def test_a_class_without_any_count_is_like_the_rarest_one(name):
    tables = []
    for zero in (0, int(COUNTS.sort().values[1])):
        made = sampler_of(
            name, D, 50 if name == "frequency" else None, COUNTS.masked_fill(COUNTS == 1, zero), 1.0
        )
        tables.append(made.log_share if name == "in_batch" else made.log_expected)
    assert torch.equal(*tables)


def test_negatives_of_the_batch_are_its_targets():
    made = sampler_of("in_batch", D, None, COUNTS, 1.0)
    ignored = torch.tensor([False, True, False, False, False])
    classes, log_expected = made.choose(TARGET, ignored, torch.float64)
    assert torch.equal(classes, TARGET)
    share = [float(COUNTS[t]) / float(COUNTS.sum()) for t in TARGET]
    want = [math.log(3 * x) for x in share]  # three other rows that are not ignored
    want[1] = math.inf
    torch.testing.assert_close(log_expected, torch.tensor(want).double(), rtol=1e-6, atol=0)
    classes, log_expected = sampler_of("in_batch", D, None, None, 1.0).choose(
        TARGET, ignored, torch.float64
    )
    assert torch.equal(classes, TARGET)
    assert log_expected.tolist() == [0, math.inf, 0, 0, 0]


class Work(TorchDispatchMode):
    """Counts the numbers in the tensors that are made."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.made += out.numel()
        return out


def test_a_draw_makes_as_little_for_many_classes_as_for_few():
    made = []
    for many in (10_000, 1_000_000):
        counts = torch.arange(1, many + 1)
        samplers = (
            sampler_of("log_uniform", many, 50, None, 1.0),
            sampler_of("frequency", many, 50, counts, 1.0),
            sampler_of("in_batch", many, None, counts, 1.0),
        )
        with Work() as seen:
            for each in samplers:
                each.choose(TARGET, NONE, torch.float64)
        made.append(seen.made)
    assert max(made) < 1000


REFUSED = {
    "sampler must be one of log_uniform, frequency, in_batch, got 'uniform'": {"name": "uniform"},
    "num_samples must be at least 1, got 0": {"num_samples": 0},
    "num_samples must be an integer, got 1.5": {"num_samples": 1.5},
    "power must be zero or positive, and finite, got -1": {"power": -1},
    "power has a meaning for sampler='frequency' alone, got 0.5 with 'log_uniform'": {"power": 0.5},
    "counts have no meaning for sampler='log_uniform'.*use sampler='frequency'": {"counts": COUNTS},
    "sampler='frequency' needs counts.*use 'log_uniform'": {"name": "frequency"},
    "counts must be zero or positive, and finite.*got -1 for class 0": {
        "name": "frequency",
        "counts": torch.arange(-1, D - 1),
    },
    r"counts must have shape \(41,\).*got \(40,\)": {"name": "in_batch", "counts": COUNTS[1:]},
    "counts must be a tensor of class counts": {"name": "frequency", "counts": [1] * D},
    "num_samples has no meaning for sampler='in_batch', got 5": {
        "name": "in_batch",
        "num_samples": 5,
    },
    "power must keep every count positive and finite, got 1000": {
        "name": "frequency",
        "counts": COUNTS,
        "power": 1000,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_sampler_cannot_do_is_refused(message):
    given = {"name": "log_uniform", "num_samples": SAMPLES, "counts": None, "power": 1.0}
    given |= REFUSED[message]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        sampler_of(given["name"], D, given["num_samples"], given["counts"], given["power"])


def test_a_sampler_of_the_batch_alone_is_for_any_number_of_classes():
    assert InBatch(None).num_classes is None
    assert sampler_of("in_batch", D, None, COUNTS, 1.0).num_classes == D
    assert drawn("log_uniform", 3).num_classes == D
