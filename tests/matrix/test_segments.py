"""Rows of clusters as padded batches."""

from __future__ import annotations

import pytest
import torch

from softsphere.matrix.segments import Segments

SIZES = (0, 1, 700, 3, 0, 5, 1, 64, 2)
CLUSTER = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
ORDER = torch.randperm(len(CLUSTER), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", [2, 400])
@pytest.mark.parametrize("longest", [None, 10, 128])
def test_every_row_is_in_one_place_beside_rows_of_its_cluster(width, longest):
    cluster = CLUSTER[ORDER]
    values = torch.arange(1.0, len(cluster) + 1)
    copied, seen = torch.zeros_like(values), torch.zeros_like(values)
    for piece in Segments.of(cluster).pieces(width, longest):
        assert (cluster[piece.index] == piece.ids.unsqueeze(1)).all()
        taken = piece.take(values)
        is_row = taken > 0
        assert torch.equal(taken[is_row], values[piece.index[is_row]])
        seen.index_add_(0, piece.index[is_row], torch.ones(int(is_row.sum())))
        piece.put(taken, copied)
    assert torch.equal(copied, values)
    assert (seen == 1).all()


def test_padding_is_zero_beside_rows_that_are_not_finite():
    values = torch.full((len(CLUSTER), 3), torch.nan)
    for piece in Segments.of(CLUSTER).pieces(2):
        taken = piece.take(values)
        assert not taken[~taken.isnan()].any()


def test_the_batches_are_few_and_at_most_three_quarters_are_padding():
    cluster = torch.arange(1000).repeat_interleave(torch.arange(1000) % 200)
    pieces = list(Segments.of(cluster).pieces(2))
    assert len(pieces) <= 5
    assert sum(piece.index.numel() for piece in pieces) <= 4 * len(cluster)


def test_a_piece_gathers_some_mib():
    cluster, width = torch.arange(500), 256
    most = (4 if cluster.device.type == "cpu" else 64) << 20
    gathered = [len(piece.ids) * width**2 * 8 for piece in Segments.of(cluster).pieces(width)]
    assert max(gathered) == most and sum(gathered) == 500 * width**2 * 8
