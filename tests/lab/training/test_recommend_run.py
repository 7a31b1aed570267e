"""Recommenders under training: what they learn, and how recall and gain are counted."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from softsphere_lab.data import interactions
from softsphere_lab.experiments.on_items.gowalla import EXPERIMENT
from softsphere_lab.models.item_clusters import item_clusters
from softsphere_lab.models.item_networks import STD
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.training.recommend_run import CUTOFF, RecommendRun, Setup, recall_and_ndcg

DATA = interactions.generated()
SETUP = Setup(width=8, batch_size=32, epochs=25)
OUTPUTS = [
    Output("softmax", prior=True),
    Output("sampled_softmax", prior=True, samples=20),
    Output("taylor_softmax", prior=True),
    Output("z_loss:a=1:b=2", tied=True),
    Output("taylor_softmax", prior=True, factored=True, rate=0.01),
    Output("taylor_softmax", clusters=8, shortlist=10),
    Output("taylor_softmax", tied=True, clusters=8, shortlist=10),
    Output("squared_error:unobserved=0.1"),
]


def by_definition(best: list[int], wanted: list[int]) -> tuple[float, float]:
    """Recall and normalised discounted gain of one user."""
    hits = [item in wanted for item in best]
    gain = sum(hit / math.log2(place + 2) for place, hit in enumerate(hits))
    ideal = sum(1 / math.log2(place + 2) for place in range(min(len(wanted), len(best))))
    return sum(hits) / len(wanted), gain / ideal


def test_recall_and_gain_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    best = torch.stack([torch.randperm(30, generator=generator)[:5] for _ in range(40)])
    wanted = [torch.randperm(30, generator=generator)[: 1 + row % 9] for row in range(40)]
    place = torch.tensor([row for row, items in enumerate(wanted) for _ in items])
    got = recall_and_ndcg(best, place, torch.cat(wanted))
    for row in range(40):
        want = by_definition(best[row].tolist(), wanted[row].tolist())
        assert got[row].tolist() == pytest.approx(want, abs=1e-12)


def trained(output: Output, **options) -> RecommendRun:
    assignment = None if output.clusters is None else item_clusters(DATA, output).assignment
    run = RecommendRun(DATA, output, 3e-2, 0, SETUP, assignment=assignment, **options)
    run.train(SETUP.epochs, Checkpoint())
    return run


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_every_layer_learns_whose_items_are_whose(output):
    """The commonest items alone are right as often as chance has it, about one in six."""
    run = trained(output)
    recall, ndcg = run.quality(DATA.test)
    assert not run.diverged
    assert recall > 0.25
    assert 0 < ndcg < 1
    final = run.final(read_test=False)
    assert (final.test_recall, final.test_ndcg) == (None, None)
    assert (final.valid_recall, final.valid_ndcg) == run.quality(DATA.valid)
    assert final.best_epoch == SETUP.epochs


def test_known_items_are_never_recommended_and_the_metric_is_that_of_the_best_others():
    run = trained(OUTPUTS[2])
    run.model.eval()
    known, wanted = (
        [part.of_users(torch.tensor([u]))[1].tolist() for u in range(interactions.USERS)]
        for part in (DATA.train, DATA.valid)
    )
    results = []
    with torch.no_grad():
        for mine, theirs in zip(known, wanted, strict=True):
            hidden = run.model(torch.tensor(mine), torch.tensor([len(mine)]))
            log_p = run.head.log_prob(hidden)[0]
            log_p[mine] = -torch.inf
            results.append(by_definition(log_p.topk(CUTOFF).indices.tolist(), theirs))
    want = torch.tensor(results, dtype=torch.float64).mean(0)
    assert run.quality(DATA.valid) == pytest.approx(want.tolist(), abs=1e-9)


def test_a_run_on_both_parts_ends_with_its_last_epoch_and_knows_the_items_of_both():
    run = trained(OUTPUTS[2], joined=True)
    assert run.known.items.shape == (len(DATA.train.items) + len(DATA.valid.items),)
    final = run.final(read_test=True)
    assert final.best_epoch == SETUP.epochs
    assert final.valid_recall is None and final.test_recall > 0.25


@pytest.mark.parametrize("output", [x for x in OUTPUTS if x.tied], ids=str)
def test_a_tied_network_reads_the_rows_of_the_layer_and_resumes_with_them(output):
    assignment = None if output.clusters is None else item_clusters(DATA, output).assignment
    run, again = (
        RecommendRun(DATA, output, 3e-2, 0, replace(SETUP, epochs=2), assignment=assignment)
        for _ in range(2)
    )
    assert not [*run.model.parameters()]
    every = torch.arange(DATA.num_items)
    begun = run.model.embedding(every).detach().clone()
    assert begun.std() == pytest.approx(STD, rel=0.1)
    run.train(1, Checkpoint())
    again.resume(copy.deepcopy(run.state()))
    for each in (run, again):
        torch.manual_seed(1)
        each.train(2, Checkpoint())
    read = run.model.embedding(every)
    assert not torch.isclose(read, begun).any(dim=1).all()
    assert torch.equal(read, again.model.embedding(every))


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_rows_of_the_weights_that_AdamW_steps_are_cut(output):
    setup = replace(SETUP, longest=0.2, epochs=2)
    assignment = None if output.clusters is None else item_clusters(DATA, output).assignment
    run = RecommendRun(DATA, output, 3e-2, 0, setup, assignment=assignment)
    run.train(setup.epochs, Checkpoint())
    norms = torch.cat(
        [
            torch.as_tensor(x.detach().to_dense() if output.factored else x.detach()).norm(dim=1)
            for x in run.head.parameters()
            if x.dim() == 2
        ]
    )
    assert bool((norms > 0.2 + 1e-6).any()) == output.factored


def test_what_a_search_chose_is_part_of_the_setting():
    study = EXPERIMENT.studies["smoke"]
    assert study.setting("squared_error", {"unobserved": 0.1, "lr": 0.03}) == (
        "squared_error:unobserved=0.1",
        0.03,
    )


def test_layers_with_other_sizes_have_clusters_of_their_own(tmp_path):
    outputs = [
        Output("softmax"),
        Output("taylor_softmax", clusters=8),
        Output("taylor_softmax", clusters=8, shortlist=10),
        Output("softmax", tied=True, clusters=8, shortlist=10),
        Output("softmax", clusters=8, shortlist=10, by="frequency"),
    ]
    study = replace(EXPERIMENT.studies["smoke"], outputs=tuple(outputs))
    data = study.furnished(study.load(), tmp_path)
    found, counts = data.assignments, data.interactions.counts
    assert [*found] == ["co-visits-8", "co-visits-8-shortlist-10", "frequency-8-shortlist-10"]
    ten, by_frequency = list(found.values())[1:]
    assert not torch.equal(ten, by_frequency)
    for assignment in (ten, by_frequency):
        commonest = counts.topk(10).values
        assert torch.equal(counts[assignment < 0].sort(descending=True).values, commonest)
    again = study.furnished(study.load(), tmp_path)
    assert all(torch.equal(each, again.assignments[name]) for name, each in found.items())
