"""A class that is alone: its probability is 1, and training must leave its row as it is."""

from __future__ import annotations

import pytest
import torch

from _clustered import ASSIGNMENTS, D, d, layer, rows
from softsphere import ClusteredLoss, FactoredSphericalLoss, losses
from softsphere.engines.leaf_choice import LEAF_ENGINES

M = 60


@pytest.mark.parametrize("leaf", ["taylor_softmax", "spherical_softmax"])
@pytest.mark.parametrize("engine", LEAF_ENGINES)
def test_a_cluster_of_one_class_has_no_loss_of_its_own_and_is_not_trained(engine, leaf):
    head = layer(ASSIGNMENTS["clusters of one"], leaf, engine=engine, reduction="none")
    target = torch.arange(M) % D
    alone = head.assignment[target] >= 0
    before = head.state_dict()["weight"].clone()
    loss = head(rows(M), target)
    entry = head.grouping.root_entry(head.assignment[target], head.grouping.place[target])
    of_root = -head.root(rows(M)).log_softmax(1).gather(1, entry.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(loss[alone], of_root[alone], rtol=1e-12, atol=1e-12)
    loss.mean().backward()
    torch.optim.SGD(head.parameters(), lr=1e3).step()
    assert torch.equal(head.state_dict()["weight"], before)


def test_factored_leaves_train_beside_a_class_that_is_alone():
    # of the kept sums alone its loss would be a difference whose error grows in every step
    torch.manual_seed(0)
    assignment = torch.zeros(200, dtype=torch.long)
    assignment[0] = 1
    head = ClusteredLoss(8, 200, assignment, engine="factored", reduction="none")
    optimizer = torch.optim.SGD(head.parameters(), lr=10.0)
    for _ in range(40):
        target = torch.randint(200, (64,))
        target[:20] = 0
        hidden = torch.randn(64, 8)
        loss = head(hidden, target)
        nll = -head.log_prob(hidden)[torch.arange(64), target]
        torch.testing.assert_close(loss, nll, rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert head.health().gram_drift < 1e-3


@pytest.mark.parametrize(
    "name", [name for name, kind in losses.REGISTRY.items() if issubclass(kind, losses.Spherical)]
)
def test_a_factored_layer_of_one_class_has_no_distribution(name):
    if losses.REGISTRY[name].normalised:
        with pytest.raises(ValueError, match="num_classes must be at least 2 for loss="):
            FactoredSphericalLoss(d, 1, name)
    else:
        FactoredSphericalLoss(d, 1, name)
