"""What output layers of language models begin with."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from softsphere import ClusteredLoss, SampledSoftmaxLoss
from softsphere_lab.errors import LabError
from softsphere_lab.models.output_layers import SMALLER, Output, layer, tied_rows

COUNTS = torch.arange(1, 31)


def linear(width: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, len(COUNTS))


@pytest.mark.parametrize(
    "name",
    [
        "softmax",
        "taylor_softmax prior",
        "spherical_softmax factored rate=0.1",
        "squared_error",
        "squared_error factored rate=0.1",
    ],
)
def test_layers_begin_with_the_same_weights_and_squared_error_with_smaller_ones(name):
    output, begun = Output.parse(name), linear(8)
    torch.manual_seed(0)
    head, own = layer(output, 8, COUNTS, "cpu")
    assert (own is not None) == output.factored
    smaller = SMALLER.get(output.loss, 1.0)
    assert (smaller < 1) == (output.loss == "squared_error")
    got = head.to_linear() if output.factored else head
    torch.testing.assert_close(got.weight, smaller * begun.weight)
    torch.testing.assert_close(got.bias, smaller * begun.bias)


@pytest.mark.parametrize(
    "name",
    [
        "sampled_softmax",
        "sampled_softmax samples=1024",
        "sampled_softmax prior samples=64 sampler=log_uniform",
        "adaptive_softmax cutoffs=2000,10000,40000 div_value=2.0",
        "hierarchical_softmax lstm",
        "taylor_softmax prior factored rate=0.1",
        "z_loss:a=1.0:b=8.0 tied",
    ],
)
def test_names_are_read_as_they_are_written(name):
    assert str(Output.parse(name)) == name


@pytest.mark.parametrize("sampler", ["frequency", "log_uniform", "in_batch"])
@pytest.mark.parametrize("prior", [False, True])
def test_sampled_softmax_may_begin_with_the_frequencies(prior, sampler):
    torch.manual_seed(0)
    output = Output("sampled_softmax", prior=prior, samples=None, sampler=sampler)
    head, own = layer(output, 8, COUNTS, "cpu")
    assert own is None and isinstance(head, SampledSoftmaxLoss) and head.sampler == sampler
    if prior:
        share = head.eval().log_prob(torch.zeros(8)).exp()
        torch.testing.assert_close(share, COUNTS / COUNTS.sum())
    else:
        assert torch.equal(head.weight, linear(8).weight)
        assert torch.equal(head.bias, linear(8).bias)


def test_sampled_softmax_has_the_samples_of_its_name():
    head, _ = layer(Output.parse("sampled_softmax samples=7"), 8, COUNTS, "cpu")
    assert head.num_samples == 7
    assert layer(Output("sampled_softmax"), 8, COUNTS, "cpu")[0].num_samples == 1024


def test_adaptive_softmax_has_the_cutoffs_and_widths_of_its_name():
    output = Output.parse("adaptive_softmax cutoffs=10,20 div_value=2")
    head, _ = layer(output, 8, COUNTS, "cpu")
    assert head.layer.cutoffs == [10, 20, 30]
    assert [tail[0].out_features for tail in head.layer.tail] == [4, 2]


@pytest.mark.parametrize("cutoffs", ["10", "10,20"])
def test_adaptive_softmax_may_begin_with_the_frequencies_of_its_clusters(cutoffs):
    output = Output.parse(f"adaptive_softmax prior cutoffs={cutoffs} div_value=1.0")
    ends = [*map(int, cutoffs.split(",")), 30]
    for counts in (COUNTS, COUNTS.roll(7)):
        head, _ = layer(output, 8, counts, "cpu")
        wanted, order = (counts / counts.sum()).sort(descending=True, stable=True)
        share = head.log_prob(torch.zeros(8)).exp()[order]
        torch.testing.assert_close(share[:10], wanted[:10])
        for begin, end in itertools.pairwise(ends):
            torch.testing.assert_close(share[begin:end].sum(), wanted[begin:end].sum())


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "softmax samples=3": "samples is for sampled_softmax, got it for softmax",
        "adaptive_softmax sampler=in_batch": "sampler is for sampled_softmax",
        "sampled_softmax cutoffs=3,4": "cutoffs is for adaptive_softmax",
        "hierarchical_softmax div_value=2": "div_value is for adaptive_softmax",
        "hierarchical_softmax prior": "prior has no meaning for hierarchical_softmax",
        "hierarchical_softmax factored": "factored has no meaning for hierarchical_softmax",
        "sampled_softmax factored": "factored has no meaning for sampled_softmax",
        "hierarchical_softmax tied": "'hierarchical_softmax tied' cannot be tied",
        "adaptive_softmax tied": "'adaptive_softmax tied' cannot be tied",
        "adaptive_softmax tied div_value=2.0": "cannot be tied: its rows are no input embeddings",
        "taylor_softmax factored tied": "cannot be tied: its rows are no input embeddings",
    }.items(),
)
def test_words_that_a_layer_has_no_use_for_are_refused(name, words):
    with pytest.raises(LabError, match=words):
        Output.parse(name)


def test_clusters_begin_with_the_frequencies_and_have_the_leaves_of_their_name():
    assignment = torch.tensor([-1] * 10 + [0, 1, 2, 3] * 5)
    for loss in ("taylor_softmax", "softmax", "spherical_softmax:eps=0.1"):
        output = Output(loss, clusters=4, shortlist=10)
        head, own = layer(output, 8, COUNTS, "cpu", assignment)
        assert own is None and isinstance(head, ClusteredLoss) and head.num_clusters == 4
        assert head.loss == output.spec.loss()
        torch.nn.init.zeros_(head.weight)
        share = head.log_prob(torch.zeros(8)).exp()
        torch.testing.assert_close(share, COUNTS / COUNTS.sum())
    with pytest.raises(ValueError, match="needs the assignment"):
        layer(Output("softmax", clusters=4), 8, COUNTS, "cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("softmax shortlist=5", "for an output layer with clusters"),
        ("softmax by=frequency", "for an output layer with clusters"),
        ("softmax clusters=5 by=colour", "by must be frequency"),
        ("adaptive_softmax clusters=5", "no meaning for adaptive_softmax"),
        ("taylor_softmax prior clusters=5", "prior has no meaning"),
        ("taylor_softmax factored clusters=5", "factored has no meaning"),
        ("taylor_softmax classes=9 clusters=5", "classes has no meaning"),
        ("taylor_softmax tied clusters=5 leaf_features=2", "cannot be tied"),
    ],
)
def test_what_has_no_meaning_beside_clusters_is_refused(name, words):
    with pytest.raises(LabError, match=words):
        Output.parse(name)


@pytest.mark.parametrize("name", ["z_loss tied", "sampled_softmax tied", "softmax tied clusters=3"])
def test_tied_rows_are_those_of_the_layer(name):
    output = Output.parse(name)
    assignment = None if output.clusters is None else torch.arange(len(COUNTS)) % 4 - 1
    head, own = layer(output, 8, COUNTS, "cpu", assignment)
    rows, wanted = torch.randn(len(COUNTS), 8), torch.tensor([7, 3, 7, 29])
    read = tied_rows(head, rows)
    assert own is None and torch.equal(read(wanted), rows[wanted])
    read(wanted).sum().backward()
    weights = [x.grad for x in head.parameters() if x.dim() == 2 and x.grad is not None]
    assert sorted(torch.cat(weights).sum(1).tolist())[-3:] == [8.0, 8.0, 16.0]
