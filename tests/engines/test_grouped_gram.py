"""The Gram matrices of clusters where float32 products are rounded."""

from __future__ import annotations

import pytest
import torch

from _matrix_units import float32_may_be, float32_rounded_to
from softsphere.engines import grouped_gram
from softsphere.engines.grouped_gram import cluster_statistics
from softsphere.engines.grouping import Group, Grouping


@pytest.mark.parametrize(("precision", "bits"), [("high", 10), ("medium", 7)])
def test_sums_of_squares_where_outputs_cancel(monkeypatch, precision, bits):
    """The error is that of all outputs: a column of the weight that the bias takes off again."""
    torch.manual_seed(0)
    W, Z = 0.1 * torch.randn(600, 8), 0.1 * torch.randn(40, 8)
    W[:, 0], Z[:, 0] = torch.randn(600), 1.3
    b, of_leaf = -1.3 * W[:, 0], torch.arange(600) // 300
    cluster = torch.arange(40) // 20
    group = Group(cluster, cluster * 300, Grouping.of(of_leaf))
    own = of_leaf == cluster.unsqueeze(1)

    def by_outputs(Z, W, b):
        return ((Z @ W.mT + b) * own).square().sum(1)

    want = by_outputs(Z.double(), W.double(), b.double())
    float32_may_be(monkeypatch, precision)
    with float32_rounded_to(bits):
        ours, theirs = cluster_statistics(Z, W, b, torch.ones(600), group)[1], by_outputs(Z, W, b)
    terms = 2 * 300 * 1.3**2
    bound = 2 * (theirs - want).abs().max() + 2.0**-16 * terms
    assert ((ours - want).abs() <= bound).all()


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (4, 30), (100, 20), (128, 32)])
def test_clusters_that_are_one_portion_each_have_the_places_that_are_counted(size, rows):
    """Where all have the same sizes and rows, none of the places is padding."""
    C = 5
    grouping = Grouping.of(torch.arange(C).repeat_interleave(size))
    cluster = torch.arange(C).repeat_interleave(rows)
    blocks, tiles = grouped_gram._portions(Group(cluster, cluster * size, grouping).touched)
    counted = grouped_gram.places(C, C * size, size, C * rows, rows)
    assert counted == (blocks.place.numel(), tiles.place.numel()) == (C * size, C * rows)
