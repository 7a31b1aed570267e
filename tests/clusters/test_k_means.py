"""Clusters whose share of the frequency is bounded."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from softsphere.clusters import by_vectors, k_means

CENTRES = torch.eye(3)


def unit(*rows: tuple[float, ...]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


@pytest.mark.parametrize(
    ("bound", "expected"),
    [(1.0, [0, 0, 0, 0, 1, 2]), (0.55, [0, 0, 0, 1, 1, 2]), (0.4, [0, 2, 0, 1, 1, 2])],
)
def test_the_nearest_stay_and_the_others_go_on_to_the_next_with_room(bound, expected):
    rows = unit((9, 0, 1), (9, 4, 0), (9, 0.5, 0), (9, 5, 0), (0, 9, 0), (0, 0, 9))
    share = torch.full((6,), 1 / 6, dtype=torch.float64)
    assert k_means.within_bound(rows, CENTRES, share, bound, 3).tolist() == expected


def test_centres_are_directions_however_their_classes_are_spread():
    centres = k_means.spherical_centres(F.normalize(planted("random")), torch.ones(300), 4, 0)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(4))


def planted(kind: str, D: int = 300) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(D, 8, generator=g)
    if kind == "equal":
        return torch.ones(D, 8)
    if kind == "one bundle":
        return 20 + noise
    if kind == "two bundles":
        return 10 * F.one_hot(torch.arange(D) % 2, 8).float() + 0.1 * noise
    if kind == "mostly zero":
        return noise * (torch.arange(D) % 10 == 3)[:, None]
    if kind == "a bundle and others":
        return torch.where(torch.arange(D)[:, None] % 8 == 0, noise, 1 + 1e-3 * noise)
    return noise


KINDS = ["equal", "a bundle and others", "one bundle", "two bundles", "mostly zero", "random"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("C", [1, 7, 64])
@pytest.mark.parametrize("factor", [None, 1, 1.5])
def test_the_bound_holds_and_no_cluster_is_empty(kind, C, factor):
    counts = 1000 / torch.arange(1, 301).double() ** 1.1
    tail = counts[10:] / counts[10:].sum()
    least = min(1.0, 1 / C + float(tail[0]))
    given = None if factor is None else min(1.0, factor * least)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    clusters = by_vectors(
        planted(kind)[order],
        counts[order],
        num_clusters=C,
        shortlist=10,
        largest_share=given,
    )
    assert clusters.num_clusters == C and bool((clusters.sizes > 0).all())
    limit = max(4 / C, least) if given is None else given
    assert float(clusters.shares.max()) <= limit + 1e-12
    assert sorted(clusters.classes(-1).tolist()) == sorted(order.argsort()[:10].tolist())


def test_classes_without_a_vector_even_out_the_clusters():
    vectors = planted("two bundles")
    vectors[100:] = 0
    clusters = by_vectors(vectors, torch.ones(300), num_clusters=4, shortlist=0)
    assert int(clusters.sizes.max() - clusters.sizes.min()) <= 1


def test_only_the_commonest_classes_place_the_centres(monkeypatch):
    monkeypatch.setattr(k_means, "FITTED", 20)
    axes = F.one_hot(torch.arange(20) % 4, 8).float()
    rare = planted("random")[:100].abs()
    clusters = by_vectors(
        torch.cat([axes, rare]), torch.arange(120, 0, -1), num_clusters=4, shortlist=0,
        largest_share=1.0,
    )  # fmt: skip
    # The four directions have a cluster each, and the others are in the one of their largest part.
    of = clusters.assignment[:4]
    assert sorted(of.tolist()) == [0, 1, 2, 3]
    assert torch.equal(clusters.assignment[20:], of[rare[:, :4].argmax(1)])


@pytest.mark.parametrize("seed", range(3))
def test_common_classes_have_more_of_the_centres(seed):
    angle = torch.tensor([0.0, 0.3] + 100 * [2.0, 2.3])
    vectors = torch.stack([angle.cos(), angle.sin()], 1)
    counts = torch.tensor([10**6, 10**6] + 200 * [1])
    options = {"num_clusters": 3, "shortlist": 0, "largest_share": 1.0, "seed": seed}
    of = by_vectors(vectors, counts, **options).assignment
    assert of[0] != of[1] and len(of[2:].unique()) == 1
    of = by_vectors(vectors, torch.ones(202), **options).assignment
    assert of[0] == of[1] and len(of[2:].unique()) == 2


def test_cosines_in_blocks_are_those_of_the_whole(monkeypatch):
    args = (planted("random"), torch.ones(300))
    whole = by_vectors(*args, num_clusters=7, shortlist=0, largest_share=0.15)
    monkeypatch.setattr(k_means, "BLOCK", 20)
    parts = by_vectors(*args, num_clusters=7, shortlist=0, largest_share=0.15)
    assert torch.equal(whole.assignment, parts.assignment)
