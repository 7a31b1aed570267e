"""Clusters of equally common classes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softsphere.clusters import Clusters, by_frequency


def naive(ordered: list[float], C: int) -> list[int]:
    """The runs of descending counts, one class after the other."""
    total = sum(math.sqrt(count) for count in ordered)
    found, below, last = [], 0.0, -1
    for i, count in enumerate(ordered):
        middle = below + math.sqrt(count) / 2
        below += math.sqrt(count)
        # not more than one further than the last one, and in time for every cluster to have one
        wanted = min(int(middle / total * C), last + 1 if i else 0)
        last = max(wanted, C - (len(ordered) - i), 0)
        found.append(last)
    return found


def zipf(D: int) -> torch.Tensor:
    return 1e6 / torch.arange(1, D + 1).double()


@settings(deadline=None)
@given(
    counts=st.lists(st.sampled_from([1.0, 4.0, 9.0, 100.0, 2500.0, 1e8]), min_size=1, max_size=30),
    share=st.floats(0, 1),
)
def test_runs_are_those_of_the_definition_and_no_cluster_is_empty(counts, share):
    C = 1 + round(share * (len(counts) - 1))
    clusters = by_frequency(torch.tensor(counts), num_clusters=C, shortlist=0)
    order = sorted(range(len(counts)), key=lambda k: -counts[k])
    assert clusters.assignment[order].tolist() == naive([counts[k] for k in order], C)
    assert clusters.num_clusters == C and bool((clusters.sizes > 0).all())


def test_permuting_the_classes_permutes_the_assignment():
    counts = zipf(500)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    one = by_frequency(counts, num_clusters=16, shortlist=20)
    other = by_frequency(counts[order], num_clusters=16, shortlist=20)
    assert torch.equal(one.assignment[order], other.assignment)
    assert one.shortlist == 20 and bool((one.assignment[:20] == -1).all())


def test_of_equally_common_classes_the_lower_numbers_come_first():
    clusters = by_frequency(torch.ones(6), num_clusters=2, shortlist=2)
    assert clusters.assignment.tolist() == [-1, -1, 0, 0, 1, 1]


def test_targets_have_smaller_clusters_than_with_equal_sizes_and_with_equal_shares():
    counts, C = zipf(5000), 32
    clusters = by_frequency(counts, num_clusters=C, shortlist=100)
    tail = counts[100:]
    for weight in (torch.ones(4900), tail):
        cut = (weight.cumsum(0) / weight.sum() * C).ceil().long().clamp(1, C) - 1
        other = Clusters(torch.cat([torch.full((100,), -1), cut]), counts)
        assert clusters.outputs < 0.95 * other.outputs or (
            clusters.outputs - 100 - C < 0.9 * (other.outputs - 100 - C)
        )


def test_sizes_are_chosen_by_default():
    clusters = by_frequency(zipf(10_000))
    assert (clusters.shortlist, clusters.num_clusters) == (1500, 128)
    assert clusters.vectors is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float64])
def test_counts_may_have_any_real_dtype(dtype):
    counts = torch.tensor([100, 9, 4, 4, 1], dtype=dtype)
    clusters = by_frequency(counts, num_clusters=2, shortlist=1)
    assert clusters.assignment.tolist() == [-1, 0, 1, 1, 1]


@pytest.mark.parametrize("C", [1, 4])
def test_counts_beyond_rounding_make_no_further_cluster(C):
    """The rarest classes are too rare to change a sum of all."""
    made = by_frequency(0.5 ** torch.arange(200, dtype=torch.float64), num_clusters=C, shortlist=0)
    assert made.num_clusters == C
    assert bool((made.sizes > 0).all())
