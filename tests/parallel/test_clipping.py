"""Gradients, dense and sparse, are clipped by the norm of all of them; see also sharded tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softsphere import ClusteredLoss, SampledSoftmaxLoss
from softsphere.parallel import clip_grad_norm_

D, WIDTH = 40, 5
LAYERS = {
    "clustered": lambda sparse: ClusteredLoss(
        WIDTH, D, torch.arange(D) % 4 - 1, sparse=sparse, leaf_features=3
    ),
    "sampled": lambda sparse: SampledSoftmaxLoss(WIDTH, D, num_samples=7, sparse=sparse),
}


def gradients(name, sparse, max_norm):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, WIDTH), LAYERS[name](sparse)])
    trunk, head = model
    # a class that is met twice has two entries of a sparse gradient
    head(trunk(torch.randn(6, 3)), torch.tensor([1, 9, 9, 9, 30, 22])).backward()
    norm = clip_grad_norm_(model, max_norm)
    return norm, [p.grad.to_dense() for p in model.parameters()]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_sparse_gradients_are_clipped_as_dense_ones(name, max_norm):
    (norm, mine), (wanted, dense) = (gradients(name, sparse, max_norm) for sparse in (True, False))
    torch.testing.assert_close(norm, wanted)
    for a, b in zip(mine, dense, strict=True):
        torch.testing.assert_close(a, b)
    length = torch.cat([x.flatten() for x in mine]).norm()
    assert float(length) == pytest.approx(min(max_norm, float(norm)), rel=1e-3)


def test_parameters_are_no_model():
    model = nn.Linear(2, 2)
    for given in (model.parameters(), list(model.parameters()), model.weight):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got a "):
            clip_grad_norm_(given, 1.0)
