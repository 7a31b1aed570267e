"""The sizes that cost least, against a plain loop over the same grid."""

from __future__ import annotations

import pytest
import torch

from softsphere.clusters import default_sizes


def zipf(D: int) -> torch.Tensor:
    return 1e6 / torch.arange(1, D + 1).double()


def cost(counts: torch.Tensor, S: int, C: int) -> float:
    """The formula of the docstring."""
    ordered = sorted(counts.tolist(), reverse=True)
    tail = sum(ordered[S:]) / sum(ordered)
    return S + C + tail * (12_000 + 6 * (len(ordered) - S) / C)


def cheapest(counts: torch.Tensor, shortlists: list[int], clusters: list[int]) -> float:
    D = len(counts)
    return min(cost(counts, S, C) for S in shortlists for C in clusters if S < D and C <= D - S)


SHORTLISTS = [0] + [int(x * 10**p) for p in range(5) for x in (1, 1.5, 2, 3, 5, 7)]
POWERS = [2**p for p in range(15)]


@pytest.mark.parametrize("D", [1, 2, 3, 10, 999, 2000])
@pytest.mark.parametrize("kind", ["zipf", "uniform", "steep"])
def test_no_sizes_of_the_grid_cost_less(D, kind):
    counts = {"zipf": zipf(D), "uniform": torch.ones(D), "steep": zipf(D) ** 3}[kind]
    counts = counts[torch.randperm(D, generator=torch.Generator().manual_seed(0))]
    S, C = default_sizes(counts)
    assert cost(counts, S, C) == pytest.approx(cheapest(counts, SHORTLISTS, POWERS), rel=1e-9)
    assert 0 <= S < D and 1 <= C <= D - S


def test_a_given_size_is_kept_and_the_other_one_is_chosen_for_it():
    counts = zipf(2000)
    S, C = default_sizes(counts, shortlist=123)
    assert S == 123
    assert cost(counts, S, C) == pytest.approx(cheapest(counts, [123], POWERS), rel=1e-9)
    S, C = default_sizes(counts, num_clusters=77)
    assert C == 77
    assert cost(counts, S, C) == pytest.approx(cheapest(counts, SHORTLISTS, [77]), rel=1e-9)
    assert default_sizes(counts, shortlist=5, num_clusters=6) == (5, 6)
    # More clusters than the best shortlist leaves classes for.
    S, C = default_sizes(counts, num_clusters=1990)
    assert C == 1990 and S <= 10


def test_frequencies_and_counts_have_the_same_sizes():
    assert default_sizes(zipf(10_000)) == default_sizes((zipf(10_000) / 1e7).float())


def test_more_classes_have_more_clusters():
    sizes = [default_sizes(zipf(D)).num_clusters for D in (1000, 10_000, 100_000, 1_000_000)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_sizes_do_not_depend_on_the_default_dtype(dtype):
    want = default_sizes(torch.arange(1, 100_001))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert default_sizes(torch.arange(1, 100_001)) == want
    finally:
        torch.set_default_dtype(before)
