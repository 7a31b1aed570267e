"""What users do to a clustered layer: predictions follow the loss, or the doing is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from _clustered import ASSIGNMENTS, COUNTS, MIXED, D, d, layer, rows
from softsphere import ClusteredLoss

M = 9
TARGET = torch.randint(D, (M,), generator=torch.Generator().manual_seed(2))


class Scaled(nn.Module):
    def forward(self, x):
        return 3 * x


class Wrapper(nn.Module):
    """A layer in place of another one, with its weight and bias, as adapters make them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features).double()

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.more(x)


def with_a_stale_weight(head: ClusteredLoss) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(head.root)
    with torch.no_grad():
        head.root.weight_g.mul_(2)


def on_a_replica(head: ClusteredLoss) -> None:
    """Parameters are plain tensors on a replica, as nn.DataParallel makes them."""
    for module in (head.root, head.project):
        for name, x in [*module.named_parameters(recurse=False)]:
            del module._parameters[name]
            setattr(module, name, x.detach())


HANDLINGS: dict[str, Callable[[ClusteredLoss], object]] = {
    "pruned bias of the root": lambda head: prune.l1_unstructured(head.root, "bias", amount=3),
    "pruned weight of the root": lambda head: prune.l1_unstructured(head.root, "weight", amount=9),
    "parametrized bias of the root": lambda head: parametrize.register_parametrization(
        head.root, "bias", Scaled()
    ),
    "parametrized weight of the root": lambda head: parametrize.register_parametrization(
        head.root, "weight", Scaled()
    ),
    "hook on the root": lambda head: head.root.register_forward_hook(lambda *x: 5 * x[2]),
    "hook on the projection": lambda head: head.project.register_forward_hook(lambda *x: 5 * x[2]),
    "adapter in place of the root": lambda head: setattr(head, "root", Wrapper(head.root)),
    "adapter in place of the projection": lambda head: setattr(
        head, "project", Wrapper(head.project)
    ),
    "weight_norm of the root": with_a_stale_weight,
    "replica": on_a_replica,
}


@pytest.mark.parametrize("name", HANDLINGS)
def test_predictions_are_those_of_the_loss(name):
    head = layer(MIXED, leaf_features=3, reduction="none").eval()
    before = head(rows(M), TARGET)
    HANDLINGS[name](head)
    head.double()
    log_p = head.log_prob(rows(M))
    loss = head(rows(M), TARGET)
    assert not torch.allclose(loss, before) or name == "replica"
    torch.testing.assert_close(-log_p[torch.arange(M), TARGET], loss, rtol=1e-12, atol=1e-12)
    better = (log_p > log_p.gather(1, TARGET.unsqueeze(1))).sum(1)
    assert torch.equal(head.rank(rows(M), TARGET), better + 1)
    assert torch.equal(head.topk(rows(M), 3).indices, log_p.topk(3).indices)


def prior_times_two(head: ClusteredLoss) -> None:
    head.prior.mul_(2)


def prior_with_another_sum(head: ClusteredLoss) -> None:
    head(rows(M), TARGET)  # the layer has checked its own
    head.prior = torch.rand(len(head.prior), dtype=torch.float64) + 1


def prior_with_nan(head: ClusteredLoss) -> None:
    head.prior[0] = torch.nan


REFUSED: dict[str, tuple[Callable[[ClusteredLoss], object], str]] = {
    "prior times two": (prior_times_two, r"must sum to the number of classes in every cluster"),
    "prior with another sum": (prior_with_another_sum, "must sum to the number of classes"),
    "prior with NaN": (prior_with_nan, "prior must be positive, got nan"),
    "prior with 0": (lambda head: head.prior.__setitem__(0, 0.0), "prior must be positive, got 0"),
    "no prior": (lambda head: setattr(head, "prior", None), "prior must be a tensor, got None"),
    "prior too short": (lambda head: setattr(head, "prior", head.prior[1:]), "prior must have"),
    "weight too wide": (
        lambda head: setattr(head, "weight", nn.Parameter(torch.randn(len(head.weight), 4))),
        r"weight must have shape \(\d+, 3\)",
    ),
    "root too wide": (
        lambda head: setattr(head, "root", nn.Linear(d + 1, head.root.out_features)),
        rf"root\.weight must have {d} columns",
    ),
    "projection to another width": (
        lambda head: setattr(head, "project", nn.Linear(d, 4, bias=False)),
        r"project\.weight must have 3 rows, one for each feature of the leaves",
    ),
    "root without a weight": (
        lambda head: setattr(head, "root", nn.Sequential(head.root)),
        "root must be a linear layer whose weight is a tensor.*got torch.nn.*Sequential",
    ),
}


@pytest.mark.once("values are checked on a CPU alone")
@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_distribution_is_refused(name):
    change, words = REFUSED[name]
    head = layer(MIXED, leaf_features=3)
    change(head)
    for call in (lambda: head(rows(M), TARGET), lambda: head.log_prob(rows(M))):
        with pytest.raises(ValueError, match=words):
            call()


# Every way to another base measure, whose sums are right.
OTHER_PRIORS: dict[str, Callable[[ClusteredLoss], object]] = {
    "written": lambda head: head.prior.fill_(1.0),
    "assigned": lambda head: setattr(head, "prior", torch.ones_like(head.prior)),
}


@pytest.mark.parametrize("way", OTHER_PRIORS)
def test_factored_leaves_are_not_used_with_another_prior_than_they_are_kept_for(way):
    head = layer(MIXED, engine="factored")
    head(rows(M), TARGET)
    ones = {"prior": torch.ones_like(head.prior)}
    for call in (lambda: head(rows(M), TARGET), lambda: head.log_prob(rows(M))):
        other = layer(MIXED, engine="factored", counts=None)
        want = {name: x.clone() for name, x in head.state_dict().items()}
        OTHER_PRIORS[way](head)
        with pytest.raises(RuntimeError, match="the buffer prior has been changed"):
            call()
        head.load_state_dict(want)  # which writes the leaves anew, for the prior in it
        torch.testing.assert_close(dict(head.state_dict()), dict(want))
        call()
    with pytest.raises(RuntimeError, match="the buffer prior has been changed"):
        torch.func.functional_call(head, ones, (rows(M), TARGET))
    other.load_state_dict({**want, **ones})
    dense = layer(MIXED, engine="logits")
    dense.load_state_dict({**want, **ones})
    torch.testing.assert_close(other(rows(M), TARGET), dense(rows(M), TARGET))


def test_a_copy_of_a_layer_does_not_take_its_prior_for_checked():
    head = layer(MIXED, engine="factored")
    for _ in range(2):  # whose buffers are written more often than those of a copy
        head.load_state_dict(head.state_dict())
    head(rows(M), TARGET)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        for _ in range(4):
            other.prior.fill_(1.0)
            with pytest.raises(RuntimeError, match="the buffer prior has been changed"):
                other(rows(M), TARGET)


def test_factored_leaves_go_on_where_states_are_averaged():
    head = layer(MIXED, engine="factored", dtype=torch.float32)
    average = copy.deepcopy(head)
    for _ in range(300):
        for mine, x in zip(average.state_dict().values(), head.state_dict().values(), strict=True):
            if x.is_floating_point():
                mine.copy_(0.999 * mine + (1 - 0.999) * x)
    average(rows(M).float(), TARGET)


@pytest.mark.parametrize("engine", ["logits", "gram"])
@pytest.mark.parametrize("name", ["mixed", "clusters of one"])
def test_a_layer_that_was_first_used_in_a_transform_can_be_copied(name, engine):
    head = layer(ASSIGNMENTS[name], engine=engine)
    torch.func.grad(lambda H: head(H, TARGET))(rows(M))
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        torch.testing.assert_close(other(rows(M), TARGET), head(rows(M), TARGET))


@pytest.mark.once("values are checked on a CPU alone")
def test_the_prior_is_checked_once_for_each_change(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "softsphere.heads.clustered_state.check_prior", lambda *given: calls.append(given)
    )
    head = layer(MIXED)
    for _ in range(3):
        head(rows(M), TARGET)
        head.log_prob(rows(M))
    assert len(calls) == 1
    head.prior.mul_(1)
    head(rows(M), TARGET)
    assert len(calls) == 2


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_in_half_precision_has_a_base_measure_again(assign):
    head = layer(MIXED, dtype=torch.float32).bfloat16()
    state = {name: x.bfloat16() for name, x in head.state_dict().items() if name != "assignment"}
    state["assignment"] = head.assignment.int()
    head.load_state_dict(state, assign=assign)
    assert head.prior.dtype == head.root_shares.dtype == torch.float32
    assert head.assignment.dtype == torch.int64
    head.float().eval()
    head.reduction = "none"
    want = -head.log_prob(rows(M).float())[torch.arange(M), TARGET]
    torch.testing.assert_close(head(rows(M).float(), TARGET), want)


@pytest.mark.once("it names its devices")
@pytest.mark.parametrize("engine", ["auto", "factored"])
def test_a_layer_from_the_meta_device_begins_with_its_frequencies(engine):
    with torch.device("meta"):
        head = ClusteredLoss(d, D, MIXED, counts=COUNTS, engine=engine, dtype=torch.float64)
        ClusteredLoss(d, D, MIXED)
    assert head.weight.is_meta and head.prior.is_meta
    head = head.to_empty(device="cpu")
    head.reset_parameters()
    want = layer(MIXED, engine=engine)
    torch.testing.assert_close(head.prior, want.prior)
    torch.testing.assert_close(head.root_shares, want.root_shares)
    listed = MIXED < 0
    log_p = head.log_prob(torch.zeros(1, d, dtype=torch.float64))[0]
    torch.testing.assert_close(log_p.exp()[listed], (COUNTS / COUNTS.sum()).double()[listed])


@pytest.mark.once("it names its devices")
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_state_that_is_copied_to_the_meta_device_takes_no_frequencies_away():
    head = ClusteredLoss(d, D, MIXED, counts=COUNTS, dtype=torch.float64, device="meta")
    want = layer(MIXED)
    head.load_state_dict(want.state_dict())
    head.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(head.prior, want.prior)


def test_counts_that_the_dtype_cannot_hold_are_refused():
    counts = torch.ones(D, dtype=torch.float64)
    counts[int((MIXED >= 0).nonzero()[0])] = 1e-60
    with pytest.raises(ValueError, match=r"counts span more than torch\.float32 holds"):
        ClusteredLoss(d, D, MIXED, counts=counts)
    ClusteredLoss(d, D, MIXED, counts=counts, dtype=torch.float64)
