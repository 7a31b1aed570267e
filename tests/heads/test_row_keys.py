"""Keys tell different rows apart, whatever pattern the rows have."""

from __future__ import annotations

import itertools

import pytest
import torch

from softsphere import ClusteredLoss, FactoredSphericalLoss, LinearSphericalLoss, SampledSoftmaxLoss
from softsphere.heads import row_keys
from softsphere.heads.row_keys import keys_of_rows


def hadamard(n):
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def all_rows(values, width):
    return torch.tensor(list(itertools.product(values, repeat=width)), dtype=torch.float32)


def shifts(row):
    return torch.stack([row.roll(k) for k in range(len(row))])


WEIGHTS = {
    "Hadamard": hadamard(512),
    "Hadamard, scaled": 0.05 * hadamard(256),
    "Hadamard of powers of two": 4.0 ** hadamard(256),
    "Hadamard of 0 and 1": (hadamard(256) + 1) / 2,
    "one-hot": torch.eye(300),
    "one-hot, both signs": torch.cat([torch.eye(300), -torch.eye(300)]),
    "all signs": all_rows((-1.0, 1.0), 12),
    "all of three values": all_rows((-2.0, 0.0, 2.0), 7),
    "far powers of two": all_rows((2.0**-100, 1.0, 2.0**100), 7),
    "shifts": shifts(torch.arange(256.0)),
    "lower triangle": torch.ones(300, 300).tril(),
    "last bits": (1 + torch.arange(4096.0) * 2**-23).unsqueeze(1).expand(-1, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_different_rows_have_different_keys(name, dtype):
    W = WEIGHTS[name].to(dtype)
    assert len(keys_of_rows(W).unique()) == len(W)
    assert torch.equal(keys_of_rows(W.clone()), keys_of_rows(W))
    # and so they have in two blocks, of which the second is the bias
    assert len(keys_of_rows(W[:, :-1], W[:, -1:]).unique()) == len(W)


def test_zeros_of_either_sign_are_equal():
    assert torch.equal(keys_of_rows(torch.zeros(2, 3)), keys_of_rows(-torch.zeros(2, 3)))


D = WIDTH = 256
LAYERS = {
    "linear": lambda: LinearSphericalLoss(WIDTH, D, "softmax", bias=False),
    "factored": lambda: FactoredSphericalLoss(WIDTH, D, bias=False),
    "sampled": lambda: SampledSoftmaxLoss(WIDTH, D, bias=False),
    "one cluster": lambda: ClusteredLoss(
        WIDTH, D, torch.zeros(D, dtype=torch.long), leaf="softmax", bias=False
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_ranks_among_the_rows_of_a_hadamard_matrix(name):
    torch.manual_seed(0)
    layer, W = LAYERS[name]().eval(), 0.05 * hadamard(WIDTH)
    layer.load_state_dict({**layer.state_dict(), "weight": W})
    hidden, target = torch.randn(300, WIDTH), torch.randint(D, (300,))
    o = hidden.double() @ W.double().T
    scores = (1 + o + o.square() / 2).log() if name == "factored" else o
    wanted = 1 + (scores > scores.gather(1, target[:, None])).sum(1)
    # a rank of rounded scores may be another one where two scores are nearly equal
    assert (layer.rank(hidden, target) - wanted).abs().float().mean() < 0.05


def test_keys_are_those_of_all_rows_at_once_however_they_are_cut(monkeypatch):
    W, b = torch.randn(50, 7), torch.randn(50, 1)
    want = keys_of_rows(W, b)
    monkeypatch.setattr(row_keys, "_ROWS", 3)
    monkeypatch.setattr(row_keys, "_NUMBERS", 35)
    assert torch.equal(keys_of_rows(W, b), want)
