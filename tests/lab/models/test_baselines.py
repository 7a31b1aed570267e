"""The layers that ours are compared with: distributions, the same in loss, log_prob and rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from softsphere_lab.models import baselines
from softsphere_lab.models.baselines import AdaptiveSoftmax, HierarchicalSoftmax, default_cutoffs

d = 6
# Squares and not, one leaf a cluster, whole clusters of padding but one leaf, cutoffs passed.
SIZES = (2, 3, 7, 16, 17, 31, 2001, 2500)
LAYERS = (HierarchicalSoftmax, AdaptiveSoftmax)


def layer(kind, D, **options):
    torch.manual_seed(0)
    return kind(d, D, **options).double()


def rows(D, *shape):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, d, generator=generator, dtype=torch.float64)
    return hidden, torch.randint(D, shape, generator=generator)


def explicit(head, H):
    """log p of rows H from the weights, as the papers define it."""
    if isinstance(head, HierarchicalSoftmax):
        C, S = head.clusters, head.leaves
        top = head.top(H).log_softmax(1)
        W = head.weight.view(C, S, d)
        result = torch.empty(len(H), head.num_classes, dtype=H.dtype)
        for cluster in range(C):
            classes = torch.arange(cluster, head.num_classes, C)
            o = H @ W[cluster, : len(classes)].T
            if head.bias is not None:
                o = o + head.bias[cluster, : len(classes)]
            result[:, classes] = top[:, [cluster]] + o.log_softmax(1)
        return result
    first = head.layer.head(H).log_softmax(1)
    starts = [*head.layer.cutoffs]
    parts = [first[:, : starts[0]]]
    for i, tail in enumerate(head.layer.tail):
        parts.append(first[:, [starts[0] + i]] + tail(H).log_softmax(1))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_probabilities_are_those_of_the_definition_and_sum_to_one(kind, D, bias):
    head = layer(kind, D, bias=bias)
    hidden, _ = rows(D, 5)
    log_p = head.log_prob(hidden)
    assert log_p.shape == (5, D)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(5).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(log_p, explicit(head, hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_loss_is_the_mean_of_minus_log_prob(kind, D):
    head = layer(kind, D)
    hidden, target = rows(D, 3, 4)
    want = -head.log_prob(hidden).gather(2, target.unsqueeze(2)).mean()
    torch.testing.assert_close(head(hidden, target), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_rank_is_the_place_in_the_sorted_log_prob(kind, D, monkeypatch):
    head = layer(kind, D)
    hidden, target = rows(D, 3, 4)
    order = head.log_prob(hidden).argsort(2, descending=True)
    want = (order == target.unsqueeze(2)).int().argmax(2) + 1
    assert torch.equal(head.rank(hidden, target), want)
    # two rows at a time, and one
    for most in (2 * 3 * 8 * D, 1):
        monkeypatch.setattr(baselines, "MOST_BYTES", most)
        assert torch.equal(head.rank(hidden, target), want)


@pytest.mark.parametrize("kind", LAYERS)
def test_given_classes_are_columns_of_all(kind):
    head = layer(kind, 31)
    hidden, _ = rows(31, 3, 4)
    classes = torch.tensor([30, 0, 7, 7])
    torch.testing.assert_close(head.log_prob(hidden, classes), head.log_prob(hidden)[..., classes])


@pytest.mark.parametrize("kind", LAYERS)
def test_leading_shapes_empty_ones_included(kind):
    head = layer(kind, 31)
    for shape in ((), (2,), (2, 3, 2), (0,), (2, 0)):
        hidden, target = rows(31, *shape)
        assert head.rank(hidden, target).shape == shape
        assert head.log_prob(hidden).shape == (*shape, 31)
        assert head.log_prob(hidden, torch.tensor([3])).shape == (*shape, 1)
        if target.numel():
            assert head(hidden, target).shape == ()


@pytest.mark.parametrize("D", [7, 31, 2500])
@pytest.mark.parametrize("kind", LAYERS)
def test_classes_may_come_in_any_order_beside_their_counts(kind, D):
    """Each class is treated by its rank; of equally common classes the lower number is first."""
    mixed = torch.randperm(D, generator=torch.Generator().manual_seed(2))
    counts = torch.arange(2 * D, D, -1).div(2, rounding_mode="floor")  # pairs of equal counts
    inverse = mixed.argsort()
    # equal neighbours keep their order
    for a in range(1, D - 1, 2):
        if counts[a] == counts[a + 1] and inverse[a] > inverse[a + 1]:
            mixed[inverse[[a, a + 1]]] = mixed[inverse[[a + 1, a]]]
            inverse = mixed.argsort()
    ordered, other = layer(kind, D), layer(kind, D, counts=counts[mixed])
    hidden, target = rows(D, 3, 4)
    torch.testing.assert_close(other.log_prob(hidden), ordered.log_prob(hidden)[..., mixed])
    torch.testing.assert_close(other(hidden, inverse[target]), ordered(hidden, target))
    assert torch.equal(other.rank(hidden, inverse[target]), ordered.rank(hidden, target))
    some = torch.tensor([D - 1, 0, 3])
    torch.testing.assert_close(other.log_prob(hidden, some), other.log_prob(hidden)[..., some])
    assert other.state_dict().keys() == ordered.state_dict().keys()


@pytest.mark.parametrize("D", [7, 17, 31])
def test_leaves_that_are_no_classes_have_no_part(D):
    """Whatever their weights are, and nothing is asked of them."""
    head = layer(HierarchicalSoftmax, D)
    hidden, target = rows(D, 50)
    clusters = torch.arange(head.clusters)
    absent = head.absent(clusters)
    assert int(absent.sum()) == head.clusters * head.leaves - D
    want = head.log_prob(hidden)
    head(hidden, target).backward()
    assert not head.weight.grad.view(*absent.shape, d)[absent].any()
    assert not head.bias.grad[absent].any()
    assert head.bias.grad[~absent].all()
    with torch.no_grad():
        head.weight.view(*absent.shape, d)[absent] = 100.0
        head.bias[absent] = 100.0
    assert torch.equal(head.log_prob(hidden), want)


def test_sparse_gradients_are_the_dense_ones_of_the_targets_clusters():
    hidden, target = rows(31, 3)
    heads = [layer(HierarchicalSoftmax, 31, sparse=sparse) for sparse in (True, False)]
    for head in heads:
        head(hidden, target).backward()
    for name in ("weight", "bias"):
        one, two = (getattr(head, name).grad for head in heads)
        assert one.is_sparse and not two.is_sparse
        torch.testing.assert_close(one.to_dense(), two)
        touched = one.coalesce().indices()[0]
        assert set(touched.tolist()) == set((target % heads[0].clusters).tolist())


@pytest.mark.parametrize("kind", LAYERS)
def test_adamw_learns_a_batch_by_heart(kind):
    head = layer(kind, 31)
    hidden, target = rows(31, 4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        head(hidden, target).backward()
        optimizer.step()
    assert float(head(hidden, target).detach()) < 0.05
    assert head.rank(hidden, target).tolist() == [1, 1, 1, 1]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("kind", LAYERS)
def test_ranks_of_many_rows_are_made_some_at_a_time(kind, monkeypatch):
    monkeypatch.setattr(baselines, "MOST_BYTES", 1 << 20)
    head = layer(kind, 2500)
    hidden, target = rows(2500, 200)
    with Largest() as made:
        head.rank(hidden, target)
    assert made.bytes <= (1 << 20) // 3


@pytest.mark.parametrize(("width", "D"), [(1, 30_000), (3, 2), (8, 3_000_000), (128, 10_000_000)])
def test_every_cluster_of_the_adaptive_softmax_has_a_width(width, D):
    with torch.device("meta"):
        head = AdaptiveSoftmax(width, D)
    assert all(tail[0].out_features >= 1 for tail in head.layer.tail)


def test_few_classes_are_a_plain_softmax():
    head = layer(AdaptiveSoftmax, 31)
    hidden, _ = rows(31, 5)
    o = head.layer.head(hidden)
    assert o.shape == (5, 31)
    torch.testing.assert_close(head.log_prob(hidden), o.log_softmax(1))


def test_cutoffs_may_be_given():
    head = AdaptiveSoftmax(16, 31, cutoffs=(10, 20))
    assert head.layer.cutoffs == [10, 20, 31]
    assert default_cutoffs(512, 793_471) == [2_000, 20_000, 200_000]


@pytest.mark.parametrize("kind", LAYERS)
def test_errors_name_the_argument(kind):
    head = kind(d, 31)
    hidden, target = torch.zeros(2, d), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        kind(d, 1)
    with pytest.raises(ValueError, match="in_features must be at least 1"):
        kind(0, 31)
    with pytest.raises(ValueError, match="in_features = 6"):
        head(torch.zeros(2, 5), target)
    with pytest.raises(ValueError, match="target must have the leading shape"):
        head(hidden, target[:1])
    with pytest.raises(ValueError, match=r"target must be in \[0, 31\), got 31"):
        head.rank(hidden, target + 31)
    with pytest.raises(ValueError, match="classes must be in"):
        head.log_prob(hidden, target - 1)


def test_initial_values_are_those_of_a_linear_layer():
    torch.manual_seed(0)
    head = HierarchicalSoftmax(100, 400)
    for values in (head.weight, head.bias):
        assert 0.09 < float(values.detach().abs().max()) <= 0.1
    assert isinstance(head.weight, nn.Parameter)


@pytest.mark.parametrize("counts", [None, torch.arange(1, 32), torch.arange(31, 0, -1).roll(9)])
def test_the_rows_of_adaptive_softmax_are_read_and_copied_by_class(counts):
    """With div_value = 1 each class has a row as wide as the hidden states."""
    head = AdaptiveSoftmax(d, 31, counts=counts, cutoffs=(10, 20), div_value=1.0)
    given = torch.randn(31, d, generator=torch.Generator().manual_seed(3))
    head.copy_rows(given)
    classes = torch.tensor([[0, 30], [12, 5]])
    assert torch.equal(head.rows(classes), given[classes])
    order = torch.arange(31) if counts is None else head.ranks.argsort()
    assert torch.equal(head.layer.head.weight[:10], given[order[:10]])
    assert torch.equal(head.layer.tail[1][1].weight, given[order[20:]])
    head.rows(classes).sum().backward()
    assert head.layer.head.weight.grad[10:].abs().sum() == 0  # those of the clusters
