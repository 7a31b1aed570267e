"""Sums over equal indices, by each way of finding them."""

from __future__ import annotations

import pytest
import torch

from softsphere import equal_indices


@pytest.mark.parametrize("way", [equal_indices.places_of_equals, equal_indices._by_comparing])
@pytest.mark.parametrize(("n", "classes"), [(1, 1), (7, 3), (40, 200), (50, 5)])
def test_sums_at_the_places_of_equals(way, n, classes):
    generator = torch.Generator().manual_seed(n)
    index = torch.randint(classes, (n,), generator=generator)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    ordered, place = way(index)
    assert torch.equal(ordered[place], index)
    at_first = torch.zeros_like(x).index_add_(0, place, x)
    want = torch.zeros(classes, 2, dtype=x.dtype).index_add_(0, index, x)
    # read back by each entry, and added once to each class
    torch.testing.assert_close(at_first[place], want[index])
    torch.testing.assert_close(torch.zeros_like(want).index_add_(0, ordered, at_first), want)
