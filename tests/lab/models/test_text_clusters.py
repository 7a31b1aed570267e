"""The clusters of a text are made once for a record, from the words that are trained on."""

from __future__ import annotations

import torch

from softsphere.clusters import Clusters
from softsphere_lab.data import text
from softsphere_lab.models.kept_clusters import assignment_name, kept_assignments
from softsphere_lab.models.output_layers import Output
from softsphere_lab.models.text_clusters import BY, WordClusters

OUTPUTS = (
    Output("softmax"),
    Output("taylor_softmax", clusters=8, shortlist=50),
    Output("softmax", clusters=8, shortlist=50),
    Output("taylor_softmax", clusters=16, shortlist=50),
    Output("taylor_softmax", clusters=16, shortlist=50, by="frequency"),
)


def test_layers_with_the_same_clusters_share_them(tmp_path):
    read = text.load("generated")
    found = kept_assignments(OUTPUTS, tmp_path, BY, WordClusters(read))
    assert sorted(found) == [
        "frequency-16-shortlist-50", "meaning-16-shortlist-50", "meaning-8-shortlist-50"
    ]  # fmt: skip
    for name, assignment in found.items():
        assert assignment.shape == (len(read.words),)
        assert (assignment[:50] == -1).all() and (assignment[50:] >= 0).all()
        assert int(assignment.max()) + 1 == int(name.split("-")[1])
    means = [found[f"{by}-16-shortlist-50"] for by in ("meaning", "frequency")]
    assert not torch.equal(*means)
    # clusters by frequency are runs of words, which come commonest first
    assert torch.equal(means[1], means[1].sort().values)


def test_what_a_folder_has_is_not_made_again(tmp_path):
    read = text.load("generated")
    first = kept_assignments(OUTPUTS, tmp_path, BY, WordClusters(read))
    changed = first["meaning-8-shortlist-50"].clone()
    changed[-1] = (changed[-1] + 1) % 8
    path = tmp_path / "clusters" / "meaning-8-shortlist-50.pt"
    Clusters(changed, read.counts).save(path)
    again = kept_assignments(OUTPUTS, tmp_path, BY, WordClusters(read))
    assert torch.equal(again.pop("meaning-8-shortlist-50"), changed)
    assert all(torch.equal(each, first[name]) for name, each in again.items())
    # in another folder, the same come about as at first
    other = tmp_path / "other"
    other.mkdir()
    for name, each in kept_assignments(OUTPUTS[1:], other, BY, WordClusters(read)).items():
        assert torch.equal(each, first[name])


def test_only_words_that_are_trained_on_are_counted(tmp_path):
    read = text.load("generated")
    few = read.first(2000)
    kept_assignments(OUTPUTS, tmp_path, BY, WordClusters(few))
    for output in OUTPUTS[1:]:
        kept = Clusters.load(tmp_path / "clusters" / f"{assignment_name(output, BY)}.pt")
        assert torch.equal(kept.counts, few.counts.double())
        # the file is small
        assert kept.vectors is None
