"""Every attribute of a layer can be looked up, as `inspect.getmembers` and tracers do it."""

from __future__ import annotations

import inspect

import pytest
import torch

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SampledSoftmaxLoss,
    TaylorSoftmaxLoss,
)

CLUSTERS = torch.arange(30) % 4 - 1
LAYERS = {
    "criterion": TaylorSoftmaxLoss,
    "linear": lambda: LinearSphericalLoss(3, 30),
    "factored": lambda: FactoredSphericalLoss(3, 30),
    "sampled": lambda: SampledSoftmaxLoss(3, 30),
    **{
        f"clusters, {engine}": lambda engine=engine: ClusteredLoss(3, 30, CLUSTERS, engine=engine)
        for engine in ("auto", "logits", "gram", "factored")
    },
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_attribute_can_be_looked_up(layer):
    made = LAYERS[layer]()
    assert {"forward", "training"} <= {name for name, _ in inspect.getmembers(made)}
