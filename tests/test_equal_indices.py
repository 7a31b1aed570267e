"""Sums over equal indices, by each way of finding them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from softsphere import equal_indices
from softsphere.equal_indices import Places
from softsphere.unread import recording

WAYS = {
    "of": Places.of,
    "of equals": lambda index: Places(*equal_indices.places_of_equals(index)),
    "by comparing": lambda index: Places(*equal_indices._by_comparing(index)),
}


@pytest.mark.parametrize("summed", [nullcontext, recording])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("n", "classes"), [(1, 1), (7, 3), (40, 200), (50, 5), (4, 1 << 40), (2000, 1 << 40)]
)
def test_sums_over_equals(way, n, classes, deterministic, summed):
    """In a record, few rows are summed by a product."""
    generator = torch.Generator().manual_seed(n)
    index = torch.randint(classes, (n,), generator=generator)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    places = WAYS[way](index)
    equal = (index.unsqueeze(1) == index).to(x.dtype)
    with summed():
        for_each = places.sums_for_each(x, deterministic=deterministic)
    torch.testing.assert_close(for_each, equal @ x)
    # added once to each class, whose number here is its place among all
    number = torch.unique(index, return_inverse=True)[1]
    want = x.new_zeros(n, 2).index_add_(0, number, x)
    of_class = dict(zip(index.tolist(), number.tolist(), strict=True))
    at = torch.tensor([of_class[i] for i in places.index.tolist()], dtype=torch.long)
    with summed():
        sums = places.sums(x, deterministic=deterministic)
    torch.testing.assert_close(torch.zeros_like(want).index_add_(0, at, sums), want)


@pytest.mark.once("a GPU is not asked whether they are different")
def test_different_indices_need_no_sums():
    different = torch.tensor([5, 3, 9])
    places = Places.of(different)
    assert places.first is None and places.index is different
    x = torch.ones(3, 1)
    assert places.sums(x) is x
    assert Places.of(torch.tensor([5, 3, 5])).first is not None
    assert Places.of(different[:0]).sums(x[:0]).shape == (0, 1)
