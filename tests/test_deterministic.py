"""Where a program asks for deterministic algorithms, every layer trains and predicts."""

from __future__ import annotations

import pytest
import torch

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
    TaylorSoftmaxLoss,
)

m, D, d = 12, 40, 6
COUNTS = torch.arange(1.0, D + 1)
ASSIGNMENT = torch.arange(D) % 5 - 1


def linear(engine):
    return lambda: LinearSphericalLoss(d, D, options=LinearSphericalOptions(engine), prior=COUNTS)


def clustered(**options):
    return lambda: ClusteredLoss(d, D, ASSIGNMENT, counts=COUNTS, **options)


LAYERS = {
    **{f"linear, {engine}": linear(engine) for engine in ("dense", "chunked", "gram")},
    "factored": lambda: FactoredSphericalLoss(d, D, prior=COUNTS),
    **{
        f"clustered, {engine}": clustered(engine=engine)
        for engine in ("auto", "logits", "gram", "factored")
    },
    "clustered, sparse": clustered(sparse=True),
    "clustered softmax": clustered(leaf="softmax"),
    "sampled": lambda: SampledSoftmaxLoss(d, D, num_samples=9),
    "sampled by frequency": lambda: SampledSoftmaxLoss(
        d, D, num_samples=9, sampler="frequency", counts=COUNTS
    ),
    "sampled in the batch": lambda: SampledSoftmaxLoss(d, D, sampler="in_batch", counts=COUNTS),
}


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, device):
    torch.manual_seed(0)
    head = LAYERS[name]().to(device)
    # equal targets, whose rows add up
    hidden, target = torch.randn(m, d, device=device), torch.arange(m, device=device) // 2
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)  # the same negatives
        optimizer.zero_grad()
        losses.append(head(hidden, target))
        losses[-1].backward()
        optimizer.step()
    assert losses[1].detach() < losses[0].detach()
    with torch.no_grad():
        torch.testing.assert_close(head.log_prob(hidden).exp().sum(1), hidden.new_ones(m))
        head.topk(hidden, 3, exclude=target.unsqueeze(1))
        head.rank(hidden, target)


@pytest.mark.usefixtures("deterministic")
def test_a_criterion_with_sparse_targets_and_a_mask(device):
    torch.manual_seed(0)
    logits = torch.randn(m, D, device=device, requires_grad=True)
    target = torch.arange(2 * m, device=device).view(m, 2) // 3
    mask = torch.arange(D, device=device) != D - 1
    values = torch.ones(m, 2, device=device)
    TaylorSoftmaxLoss()(logits, target, target_values=values, mask=mask).backward()
    assert logits.grad.isfinite().all() and not logits.grad[:, -1].any()
