"""The best classes of each row among those that it does not leave out."""

from __future__ import annotations

import pytest
import torch

import _clustered
from _output_layers import CLOSE, COUNTS, D, Largest, both, every_layer, layer, rows, with_prior
from _reading import read_in_chunks
from softsphere import LinearSphericalLoss
from softsphere.heads import clustered_reader

EXCLUDE = torch.tensor([[3, -1, 17, 3], [-1, -1, -1, -1], [0, D - 1, 8, 1], [30, 29, 28, 27]])


def among_the_others(head, hidden, exclude):
    """Log-probabilities of all classes, −∞ for those left out, in plain loops."""
    log_p = head.log_prob(hidden).detach().clone()
    for row, classes in zip(log_p, exclude.tolist(), strict=True):
        row[[k for k in classes if k >= 0]] = -torch.inf
    return log_p


@pytest.mark.parametrize("size", [1, 7, D])
@with_prior
@every_layer
def test_the_best_are_those_of_the_classes_that_are_left(kind, name, prior, size):
    head, hidden = layer(kind, name, prior=prior), rows(4).detach()
    read_in_chunks(head, size)
    for k in (1, 5, D - 4):
        got, want = head.topk(hidden, k, EXCLUDE), among_the_others(head, hidden, EXCLUDE).topk(k)
        torch.testing.assert_close(got.values, want.values, **CLOSE)
        assert torch.equal(got.indices, want.indices)


@pytest.mark.parametrize("scores", [40, 10**6])
@pytest.mark.parametrize("name", _clustered.ASSIGNMENTS)
def test_classes_in_clusters_are_left_out_wherever_they_are(name, scores, monkeypatch):
    monkeypatch.setattr(clustered_reader, "SCORES", scores)
    head = _clustered.layer(_clustered.ASSIGNMENTS[name])
    hidden = _clustered.rows(4).detach()
    for k in (1, 5, _clustered.D - 4):
        got, want = head.topk(hidden, k, EXCLUDE), among_the_others(head, hidden, EXCLUDE).topk(k)
        torch.testing.assert_close(got.values, want.values, **CLOSE)
        torch.testing.assert_close(
            head.log_prob(hidden).gather(1, got.indices), want.values, **CLOSE
        )
        for row, left_out in zip(got.indices.tolist(), EXCLUDE.tolist(), strict=True):
            assert len({*row}) == k and not {*row} & {*left_out}


@both
def test_rows_and_excluded_classes_have_the_same_leading_shape(kind):
    head, hidden = layer(kind, prior=COUNTS), rows(2, 2).detach()
    got = head.topk(hidden, 3, exclude=EXCLUDE.view(2, 2, 4))
    want = head.topk(hidden.view(4, -1), 3, exclude=EXCLUDE)
    assert torch.equal(got.indices, want.indices.view(2, 2, 3))
    one = head.topk(hidden[0, 0], 3, exclude=EXCLUDE[0])
    assert torch.equal(one.indices, want.indices[0])
    assert head.topk(hidden[:0], 3, exclude=EXCLUDE.view(2, 2, 4)[:0]).indices.shape == (0, 2, 3)
    none = head.topk(hidden, D, exclude=EXCLUDE.view(2, 2, 4)[..., :0])
    assert torch.equal(none.indices, head.topk(hidden, D).indices)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
@both
def test_excluded_classes_may_be_of_any_integer_dtype(kind, dtype):
    head, hidden = layer(kind), rows(4).detach()
    exclude = EXCLUDE.clamp(min=0)
    want = head.topk(hidden, 3, exclude=exclude)
    assert torch.equal(head.topk(hidden, 3, exclude=exclude.to(dtype)).indices, want.indices)


def test_nan_scores_rank_after_minus_infinity_and_excluded_classes_never_appear():
    head = LinearSphericalLoss(2, 6, "softmax", bias=True)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([torch.nan, 5.0, 1.0, -torch.inf, 3.0, torch.nan]))
    hidden = torch.zeros(1, 2)
    for size in (1, 4, 6):
        read_in_chunks(head, size)
        best = head.topk(hidden, 4, exclude=torch.tensor([[0, 1]]))
        assert best.indices.tolist() == [[4, 2, 3, 5]]


def test_excluding_keeps_scores_of_minus_infinity():
    head = LinearSphericalLoss(2, 4, "softmax")
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, -torch.inf, 0.0, 0.0]))
    best = head.topk(torch.zeros(1, 2), 3, exclude=torch.tensor([[2]]))
    assert best.indices[0, 2] == 1 and best.values[0, 2] == -torch.inf


@both
def test_scores_are_excluded_chunk_by_chunk(kind):
    head, hidden = layer(kind), rows(4).detach()
    read_in_chunks(head, 5)
    with Largest() as largest:
        head.topk(hidden, 2, exclude=EXCLUDE)
    assert max(largest.made) < len(hidden) * D


@both
def test_excluded_classes_can_be_mapped(kind):
    head, hidden = layer(kind), rows(4).detach()
    got = torch.func.vmap(lambda h, x: head.topk(h, 3, x).indices)(hidden, EXCLUDE)
    assert torch.equal(got, head.topk(hidden, 3, EXCLUDE).indices)


WRONG = {
    "exclude must be a tensor of class indices": EXCLUDE.float(),
    r"exclude must be in \[0, 31\) or -1 for padding, got 31": EXCLUDE + 1,
    r"exclude must be in \[0, 31\) or -1 for padding, got -2": EXCLUDE - 1,
    r"exclude must have shape \(…, n\) for rows \(4,\) of hidden, got \(4,\)": EXCLUDE[:, 0],
    r"exclude must have shape .* got \(3, 4\)": EXCLUDE[:3],
    "exclude must leave at least k = 3 of the 31 classes in every row, got 29 entries": (
        torch.full((4, 29), -1)
    ),
}


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("message", WRONG)
@both
def test_what_cannot_be_excluded_is_refused(kind, message):
    with pytest.raises((TypeError, ValueError), match=message):
        layer(kind).topk(rows(4).detach(), 3, exclude=WRONG[message])
