"""Outputs, statistics and gradients of grouped rows, however sizes and rows of clusters differ."""

from __future__ import annotations

import pytest
import torch

from softsphere.engines import grouped_products
from softsphere.engines.grouped_products import group_outputs, group_statistics
from softsphere.engines.grouping import Group, Grouping
from softsphere.engines.lines import Lines

d = 3
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# The sizes of the clusters, the number of rows of each, and whether a block is a whole cluster and
# a tile all of its rows.
CASES = {
    "equal": ((5, 5, 5, 5), (2, 0, 1, 3), True, True),
    "nearly equal": ((9, 10, 10, 9), (1, 1, 0, 1), True, True),
    "small": ((1, 7, 0, 2), (4, 1, 0, 2), True, True),
    "unequal": ((70, 3, 40, 9, 1), (2, 5, 1, 0, 1), False, True),
    "a common cluster": ((9, 10, 10, 10, 9, 9), (70, 1, 2, 0, 1, 20), True, False),
    "unequal, with a common cluster": ((60, 4, 30, 8, 2), (1, 40, 2, 1, 0), False, False),
    "few rows in the large one": ((3, 90), (40, 1), False, False),
    "many rows in the small one": ((2, *[40] * 12), (60, *[1] * 12), False, False),
    "no rows": ((3, 4), (0, 0), True, True),
}


@pytest.fixture(params=[0, 10**9], ids=["tiles", "pairs"])
def products(request, monkeypatch):
    """Both ways to multiply rows with the leaves of their clusters."""
    monkeypatch.setattr(grouped_products, "_MANY_ROWS", request.param)


def made(name):
    """Lines, and Z, W, b and π, which nothing but a loop over rows looks into."""
    sizes, rows, *_ = (torch.tensor(x) for x in CASES[name][:2])
    draw = torch.Generator().manual_seed(0)
    grouping = Grouping.of(torch.arange(len(sizes)).repeat_interleave(sizes))
    cluster = torch.arange(len(rows)).repeat_interleave(rows)
    within = torch.rand(len(cluster), generator=draw) * sizes[cluster]
    place = grouping.starts[cluster] + within.long()
    group = Group(cluster, place, grouping)
    Z, W = (torch.randn(len(x), d, generator=draw).double() for x in (cluster, grouping.leaves))
    b, pi = torch.randn(len(W), generator=draw).double(), torch.rand(len(W), generator=draw)
    return Lines.of(group, d), [x.requires_grad_() for x in (Z, W, b)], pi.double()


def by_a_loop(lines, given, pi):
    """s, q and c of each row."""
    (Z, W, b), found = given, []
    for z, c, t in zip(Z, lines.group.cluster, lines.group.target, strict=True):
        own = slice(*lines.group.grouping.starts[c : c + 2])
        o = W[own] @ z + b[own]
        found.append(torch.stack([(pi[own] * o).sum(), (pi[own] * o * o).sum(), W[t] @ z + b[t]]))
    return torch.stack(found, 1) if found else Z.new_zeros(3, 0)


@pytest.mark.parametrize("name", CASES)
def test_the_layout_is_that_of_the_case(name):
    lines, *_ = made(name)
    whole, one_tile = CASES[name][2:]
    assert (lines.cut is None) == whole
    assert (len(lines.tiles.further) == 0) == one_tile


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_statistics_and_gradients_are_those_of_a_loop_over_rows(name, sparse, products):
    lines, given, pi = made(name)
    want = by_a_loop(lines, given, pi)
    found = torch.stack(group_statistics(*given, pi, lines, sparse=sparse))
    torch.testing.assert_close(found, want, **CLOSE)
    if not found.numel():
        want = 0 * sum(x.sum() for x in given)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = torch.autograd.grad(found, given, upstream.expand(found.shape))
    wanted = torch.autograd.grad(want, given, upstream)
    assert gradients[1].is_sparse == sparse
    for x, y in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(x.to_dense(), y, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_outputs_beyond_the_end_of_a_cluster_are_zero_and_have_no_gradient(name, products):
    lines, given, pi = made(name)
    o = group_outputs(*given, lines)
    ones = torch.ones(len(pi), dtype=torch.float64)
    inside = lines.cleared(lines.spread(ones)) > 0
    assert int(inside.sum()) == int(lines.group.lengths.sum())
    assert not o[~inside].any()
    s = lines.sums_of_rows(o.sum(1))
    want = by_a_loop(lines, given, ones)[0]
    torch.testing.assert_close(s, want, **CLOSE)


@pytest.mark.parametrize("name", ["unequal", "unequal, with a common cluster"])
def test_few_places_stay_empty(name):
    """The outputs, and the rows of a sparse gradient, are not many more than they need be."""
    lines, *_ = made(name)
    touched, rows = lines.group.touched, len(lines.group.cluster)
    clusters, leaves = len(touched.cluster), touched.leaves
    assert lines.leaves.numel() < leaves + clusters * lines.size
    assert lines.leaf.numel() < lines.group.pairs + rows * lines.size
    assert lines.size <= max(8, leaves / clusters / 2)
