"""What is kept of the clusters of a layer may be used by whatever is computed later."""

from __future__ import annotations

from functools import cached_property

import pytest
import torch

from softsphere._torch import untraced
from softsphere.engines.cluster_shards import ClusterShards
from softsphere.engines.grouping import Grouping

ASSIGNMENT = torch.tensor([-1, 0, 2, 1, 0, 2, 2, -1])


def grouping() -> Grouping:
    return Grouping.of(ASSIGNMENT)


def shards() -> ClusterShards:
    return ClusterShards.of(grouping(), torch.ones(5))


def kept(make):
    return [
        pytest.param(make, name, id=f"{type(make()).__name__}.{name}")
        for name, value in vars(type(make())).items()
        if isinstance(value, cached_property)
    ]


def tensors(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, Grouping):
        return [value for value in vars(x).values() if isinstance(value, torch.Tensor)]
    return []


@pytest.mark.parametrize(("make", "name"), [*kept(grouping), *kept(shards)])
def test_what_inference_mode_computed_first_can_be_trained_with(make, name):
    made = make()
    with torch.inference_mode():
        assert not any(x.is_inference() for x in tensors(getattr(made, name)))


def test_what_is_kept_has_no_gradient():
    assert not untraced(torch.is_grad_enabled)()


def test_clusters_that_inference_mode_moves_can_be_trained_with():
    with torch.inference_mode():
        moved = shards().to(torch.device("meta"))
    assert not any(x.is_inference() for x in tensors(moved.grouping))
