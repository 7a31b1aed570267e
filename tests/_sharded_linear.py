"""What a LinearSphericalLoss does on several ranks, beside one without a process group.

The file is long, since all cases run in one process group, which is slow to start.
"""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from _ranks import TIGHT, Adam, rows_of, world
from softsphere import LinearSphericalLoss, LinearSphericalOptions
from softsphere.losses import ZLoss
from softsphere.parallel import (
    Agreement,
    clip_grad_norm_,
    count_traffic,
    keep_whole_state,
    leave_out_of_ddp,
)

d = 5
COUNTS = (4, 3, 2, 0)
Z = ZLoss()


class Model(nn.Module):
    """A trunk and a head, which a checkpoint computes twice unless `reentrant` is None."""

    def __init__(self, head, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        torch.manual_seed(1)
        self.trunk, self.head = nn.Linear(d, d, dtype=torch.float64), head

    def forward(self, x, t):
        if self.reentrant is None:
            return self.head(self.trunk(x), t)
        return checkpoint(self.head, self.trunk(x), t, use_reentrant=self.reentrant)


def pair(D=23, replicated=False, **given):
    """A layer without a group and one with, of the same weight."""
    group = given.pop("process_group", None)
    given = {"dtype": torch.float64, **given}
    one = LinearSphericalLoss(d, D, **given)
    group = {"process_group": world() if group is None else group, "replicated": replicated}
    many = LinearSphericalLoss(d, D, **given, **group)
    many.load_state_dict(one.state_dict())
    many.shards.averaged = False  # many cases take rows from a larger tensor
    return one, many


def with_vectors():
    return pair(prior=torch.arange(1.0, 24), weight=torch.linspace(0.5, 2, 23))


def same_rows(one, many):
    own = many.shards.sharding.slice
    torch.testing.assert_close(many.weight.detach(), one.weight.detach()[own], **TIGHT)
    if one.bias is not None:
        torch.testing.assert_close(many.bias.detach(), one.bias.detach()[own], **TIGHT)


def train(
    rank,
    size,
    folder,
    D=23,
    steps=3,
    replicated=False,
    adam=False,
    sparse=False,
    counts=COUNTS,
    **given,
):
    """Loss, gradient of hidden and weights of every step."""
    if given.pop("prior", False):
        given["prior"] = torch.arange(1.0, D + 1)
    if given.pop("weight", False):
        given["weight"] = torch.linspace(0.5, 2, D)
    heads = pair(D, replicated, **given)
    make = Adam if adam else partial(torch.optim.SGD, momentum=0.9)
    optimizers = [make(head.parameters(), lr=0.1) for head in heads]
    for _ in range(steps):
        step_both(rank, heads, optimizers, replicated, sparse, counts[:size])
        same_rows(*heads)


def step_both(rank, heads, optimizers, replicated, sparse, counts, before_step=lambda head: 0.0):
    """A step without and with a group: the same loss, gradient of hidden and `before_step`.

    The rows of rank 1 are ignored.
    """
    D = heads[0].num_classes
    m, own = sum(counts), slice(None) if replicated else rows_of(rank, counts)
    H = torch.randn(m, d, dtype=torch.float64)
    t = torch.randint(D, (m, 3) if sparse else (m,))
    t[1:3] = t[3]
    values = torch.rand(m, 3, dtype=torch.float64) if sparse else None
    if len(counts) > 1:
        t[rows_of(1, counts)] = -100
    found = []
    for head, rows, optimizer in zip(heads, (slice(None), own), optimizers, strict=True):
        h = H[rows].clone().requires_grad_()
        loss = head(h, t[rows], None if values is None else values[rows])
        optimizer.zero_grad()
        loss.sum().backward()
        also = torch.as_tensor(before_step(head))
        optimizer.step()
        found.append((loss.detach(), h.grad, also))
    (want, by_h, also), (got, by_own, own_also) = found
    torch.testing.assert_close(got, want[own] if want.dim() else want, **TIGHT)
    torch.testing.assert_close(by_own, by_h[own], **TIGHT)
    torch.testing.assert_close(own_also, also, **TIGHT)


def count_given(rank, size, folder):
    _, many = pair()
    rows = rows_of(rank, COUNTS[:size])
    H, t = torch.randn(sum(COUNTS[:size]), d).double(), torch.arange(sum(COUNTS[:size]))
    total = many(H[rows], t[rows]) * sum(COUNTS[:size])
    torch.testing.assert_close(many(H[rows], t[rows], num_items=torch.tensor(7)), total / 7)


def accumulated(rank, size, folder, D=23, **given):
    one, many = pair(D, **given)
    rows = rows_of(rank, COUNTS[:size])
    m = sum(COUNTS[:size])
    batches = [(torch.randn(m, d).double(), torch.randint(D, (m,))) for _ in range(3)]
    seen = []
    many.weight.register_hook(lambda g: seen.append(g.shape))
    for H, t in batches:
        (one(H, t) / 3).backward()
    with many.accumulate():
        for H, t in batches:
            (many(H[rows], t[rows]) / 3).backward()
        if len(many.weight):
            raises(RuntimeError, "pending", lambda: many.weight.grad + 0)
    assert seen == [many.weight.shape] or not len(many.weight)
    own = many.shards.sharding.slice
    torch.testing.assert_close(many.weight.grad, one.weight.grad[own], **TIGHT)
    torch.testing.assert_close(many.bias.grad, one.bias.grad[own], **TIGHT)
    many.zero_grad()
    with contextlib.suppress(KeyError), many.accumulate():
        many(H[rows], t[rows]).backward()
        raise KeyError
    assert (many.weight.grad is None and many.bias.grad is None) or not len(many.weight)


def predicted(rank, size, folder, D=23, replicated=False, loss="taylor_softmax", prior=False):
    one, many = pair(D, replicated, loss=loss, prior=torch.arange(1.0, D + 1) if prior else None)
    with torch.no_grad():
        one.weight[1] = one.weight[0]
        one.bias[1] = one.bias[0]
    many.load_state_dict(one.state_dict())
    m = sum(COUNTS[:size])
    rows = slice(None) if replicated else rows_of(rank, COUNTS[:size])
    H, target = 3 * torch.randn(m, d).double(), torch.randint(D, (m,))
    target[0] = 0
    out = torch.randint(-1, D, (m, 2))
    h = H[rows]
    k = min(6, D - 2)
    assert torch.equal(many.predict(h).clamp(min=1), one.predict(H)[rows].clamp(min=1))
    assert torch.equal(many.rank(h, target[rows]), one.rank(H, target)[rows])
    for exclude in (None, out):
        want = one.topk(H, k, exclude)
        got = many.topk(h, k, None if exclude is None else exclude[rows])
        torch.testing.assert_close(got.values, want.values[rows], **TIGHT)
        # class 1 is a twin of class 0
        assert torch.equal(got.indices.clamp(min=1), want.indices[rows].clamp(min=1))
    if many.loss.normalised:
        with torch.no_grad():
            torch.testing.assert_close(many.log_prob(h), one.log_prob(H)[rows], **TIGHT)
            some = torch.tensor([D - 1, 0])
            torch.testing.assert_close(many.log_prob(h, some), one.log_prob(H, some)[rows], **TIGHT)


def train_models(models, call, own, number):
    """Steps a model on batches of a number of rows, and another on its own of them, by `call`."""
    # foreach takes no DTensors together with ordinary tensors
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.5, foreach=False) for x in models]
    for _ in range(3):
        x, t = torch.randn(number, d).double(), torch.randint(23, (number,))
        for optimizer, loss in zip(
            optimizers, (models[0](x, t), call(x[own], t[own])), strict=True
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trunk = models[1].trunk.weight
    trunk = trunk.full_tensor() if isinstance(trunk, DTensor) else trunk
    torch.testing.assert_close(trunk, models[0].trunk.weight, **TIGHT)


def below_data_parallel(
    rank, size, folder, whole=True, reentrant=None, pair=pair, same_rows=same_rows
):
    """A whole model in DistributedDataParallel, or its trunk alone."""
    one, many = pair()
    many.shards.averaged = None if whole else True
    models = [Model(one), Model(many, reentrant)]
    if whole:
        wrapped = DistributedDataParallel(leave_out_of_ddp(models[1]))
    else:
        trunk, head = DistributedDataParallel(models[1].trunk), models[1].head

        def wrapped(x, t):
            return head(trunk(x), t)

    train_models(models, wrapped, rows_of(rank, (2,) * size), 2 * size)
    same_rows(one, many)


def across_data_parallel(rank, size, folder, pair=pair, same_rows=same_rows):
    """Classes over one dimension of a mesh, and a DistributedDataParallel over the other."""
    from torch.distributed.device_mesh import init_device_mesh

    tp = 2 if size == 4 else 1
    dp, own = size // tp, rank // tp
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    one, many = pair(process_group=mesh["tp"], replicated=True)
    models = [Model(one), Model(many)]
    wrapped = DistributedDataParallel(models[1], process_group=mesh["dp"].get_group())
    train_models(models, wrapped, slice(2 * own, 2 * own + 2), 2 * dp)
    same_rows(one, many)


def below_fully_sharded(rank, size, folder, pair=pair, same_rows=same_rows):
    """The layers below are sharded by FSDP2, and the head is left out."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        return  # this torch shards on no CPU
    from torch.distributed.fsdp import fully_shard

    one, many = pair()
    many.shards.averaged = True
    models = [Model(one), Model(many)]
    fully_shard(models[1], ignored_params=set(many.parameters()))
    train_models(models, models[1], rows_of(rank, (2,) * size), 2 * size)
    same_rows(one, many)


def clipped(rank, size, folder):
    one, many = pair()
    models = [Model(one), Model(many)]
    m, own = sum(COUNTS[:size]), rows_of(rank, COUNTS[:size])
    H, t = torch.randn(m, d).double(), torch.randint(23, (m,))
    models[0](H, t).backward()
    many(models[0].trunk(H)[own].detach(), t[own]).backward()
    for p, whole in zip(models[1].trunk.parameters(), models[0].trunk.parameters(), strict=True):
        p.grad = whole.grad.clone()
    want = nn.utils.clip_grad_norm_(models[0].parameters(), 0.1)
    torch.testing.assert_close(clip_grad_norm_(models[1], 0.1).double(), want, rtol=1e-5, atol=0)
    rows = many.shards.sharding.slice
    torch.testing.assert_close(many.weight.grad, one.weight.grad[rows], **TIGHT)
    torch.testing.assert_close(models[1].trunk.weight.grad, models[0].trunk.weight.grad, **TIGHT)


def clipped_shared(rank, size, folder):
    """A weight that two layers share counts once."""
    one, many = pair()
    other = pair()[1]
    other.weight, other.bias = many.weight, many.bias
    m, own = sum(COUNTS[:size]), rows_of(rank, COUNTS[:size])
    H, t = torch.randn(m, d).double(), torch.randint(23, (m,))
    one(H, t).backward()
    many(H[own], t[own]).backward()
    want = nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    got = clip_grad_norm_(nn.ModuleList([many, other]), 0.1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


def clipped_weight_norm(rank, size, folder):
    """What a parametrization computes the rows from are rows of one rank, too."""
    one, many = pair()
    for head in (one, many):
        nn.utils.parametrizations.weight_norm(head, "weight", dim=0)
    H, t = torch.randn(4, d).double(), torch.arange(4)
    one(H, t).backward()
    own = rows_of(rank, [4, *[0] * (size - 1)])
    many(H[own], t[own]).backward()
    want = nn.utils.clip_grad_norm_(one.parameters(), 0.01)
    torch.testing.assert_close(clip_grad_norm_(many, 0.01).double(), want, rtol=1e-5, atol=0)
    rows = many.shards.sharding.slice
    for x, y in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad[rows], **TIGHT)
    adam = Adam(many.parameters(), lr=0.1)
    keep_whole_state(adam, many)
    adam.step()
    states = adam.state_dict()["state"].values()
    assert all(len(state["exp_avg"]) == 23 for state in states)


def converted(rank, size, folder):
    """A prior in float32 is normalised again in float64, as without a group."""
    given = {"prior": torch.rand(1001) + 0.1, "dtype": torch.float32}
    one, many = (head.double() for head in pair(1001, **given))
    H, t = torch.randn(4, d).double(), torch.arange(4)
    own = rows_of(rank, [4, *[0] * (size - 1)])
    torch.testing.assert_close(many(H[own], t[own]), one(H, t), **TIGHT)
    rows = many.shards.sharding.slice
    torch.testing.assert_close(many.base_measure, one.base_measure[rows], **TIGHT)


def narrowed(rank, size, folder):
    """A prior stays in float32 where the weight becomes bfloat16, as without a group."""
    one, many = (head.bfloat16() for head in pair(prior=torch.rand(23) + 0.1, dtype=torch.float32))
    own = many.shards.sharding.slice
    assert many.own_prior.dtype == torch.float32
    assert torch.equal(many.own_prior, one.base_measure[own])


def loaded_prior(rank, size, folder):
    """Counts in a state are normalised over all classes where they are loaded."""
    one, many = pair(prior=torch.ones(23))
    state = {**one.state_dict(), "prior": 10 * torch.rand(23) + 1}
    one.load_state_dict(state)
    many.load_state_dict(state)
    assert torch.equal(many.own_prior, one.prior[many.shards.sharding.slice])


def saved(rank, size, folder):
    """A checkpoint of several ranks, for `test_a_checkpoint_of_ranks_loads_in_one_process`."""
    torch.manual_seed(2)
    one, many = pair(prior=torch.arange(1.0, 24), weight=torch.linspace(0.5, 2, 23))
    dcp.save(many.state_dict(), checkpoint_id=Path(folder) / "checkpoint")
    other = LinearSphericalLoss(
        d,
        23,
        prior=torch.ones(23),
        weight=torch.ones(23),
        dtype=torch.float64,
        process_group=world(),
    )
    state = other.state_dict()
    dcp.load(state, checkpoint_id=Path(folder) / "checkpoint")
    other.load_state_dict(state)
    same_rows(one, other)
    own = other.shards.sharding.slice
    assert torch.equal(other.own_prior, one.prior[own])
    assert torch.equal(other.own_class_weight, one.class_weight[own])


def traffic_of_a_step(D):
    head = LinearSphericalLoss(d, D, "bohning_bound", process_group=world())
    with count_traffic() as traffic:
        head(torch.randn(4, d, requires_grad=True), torch.arange(4)).backward()
    return traffic.calls


def traffic_is_flat(rank, size, folder):
    assert traffic_of_a_step(10) == traffic_of_a_step(1000)


def started_apart(rank, size, folder):
    """Ranks draw other rows, and go on with the same numbers."""
    head = LinearSphericalLoss(d, 4 * size, process_group=world())
    after = torch.rand(1)
    rows = head.shards.ranks.gather(head.weight)
    assert len(rows.view(-1, d).unique(dim=0)) == 4 * size
    assert len(head.shards.ranks.gather(after).unique()) == 1


RIGHT = {
    "adam": partial(train, adam=True),
    "fewer classes than ranks": partial(train, D=2),
    "replicated": partial(train, replicated=True),
    "replicated, centred": partial(train, replicated=True, loss="bohning_bound", prior=True),
    "sparse": partial(train, sparse=True, weight=True, prior=True),
    "weights and prior": partial(train, weight=True, prior=True),
    "rows": partial(train, reduction="none", weight=True),
    "sum, no bias": partial(train, reduction="sum", bias=False),
    "a count": count_given,
    "accumulate": accumulated,
    "accumulate, centred": partial(accumulated, loss="bohning_bound"),
    "accumulate, few classes": partial(accumulated, D=2, loss="bohning_bound"),
    "a rank without rows": partial(train, counts=(4, 0, 3, 2), prior=True, weight=True),
    "predict": predicted,
    "predict, few classes": partial(predicted, D=4),
    "predict, replicated": partial(predicted, replicated=True, prior=True),
    "predict, outputs": partial(predicted, loss="z_loss"),
    "data parallel": below_data_parallel,
    "data parallel, prior": partial(below_data_parallel, pair=with_vectors),
    "data parallel trunk": partial(below_data_parallel, whole=False),
    "data parallel, checkpoint": partial(below_data_parallel, reentrant=False),
    "data parallel, reentrant checkpoint": partial(below_data_parallel, reentrant=True),
    "data parallel over another dimension": across_data_parallel,
    "fully sharded below": below_fully_sharded,
    "clipped": clipped,
    "clipped, one weight in two layers": clipped_shared,
    "clipped under a weight norm": clipped_weight_norm,
    "converted": converted,
    "narrowed": narrowed,
    "prior loaded": loaded_prior,
    "saved": saved,
    "traffic": traffic_is_flat,
    "start": started_apart,
    **{
        f"{loss}, {engine}": partial(
            train, loss=loss, options=LinearSphericalOptions(engine=engine), prior=engine == "gram"
        )
        for loss, engine in (
            *itertools.product(("taylor_softmax", "bohning_bound"), ("chunked", "gram")),
            ("squared_error", "dense"),
        )
    },
}


LONG = {
    "adam, many steps": partial(train, steps=100, adam=True),
    "momentum, many steps": partial(train, steps=100, weight=True, prior=True),
}


def raises(kind, words, call):
    with pytest.raises(kind, match=words):
        call()


def on_one(rank, mine, others, call):
    """An error on rank 0, with its text on every other rank; afterwards everything works."""
    raises(*(mine if rank == 0 else others), call)


def unowned_target(rank, size, folder):
    _, many = pair()
    H, t = torch.randn(2, d).double(), torch.tensor([3, 23 if rank == 0 else 4])
    words = r"target must be in \[0, 23\)"
    others = RuntimeError, f"rank 0 of the process group refused.*{words}"
    on_one(rank, (ValueError, words), others, lambda: many(H, t))
    many(H, t.clamp(max=4)).backward()


def other_number_of_classes(rank, size, folder):
    def make():
        LinearSphericalLoss(d, 20 + (rank == 0), process_group=world())

    raises(ValueError, "num_classes must be the same on all ranks.*21 on rank 0, 20 on", make)


def other_prior(rank, size, folder):
    def make():
        prior = torch.ones(20) + torch.arange(20) * (rank == 0)
        LinearSphericalLoss(d, 20, prior=prior, process_group=world())

    raises(ValueError, "prior must be the same on all ranks", make)


def wrong_on_one(rank, size, folder):
    def make():
        LinearSphericalLoss(d, 20, reduction="no" if rank == 0 else "sum", process_group=world())

    on_one(rank, (ValueError, "reduction"), (RuntimeError, "rank 0.*reduction must"), make)


def late_error(rank, size, folder):
    """An error after all facts were given, which are equal."""

    def agree():
        with Agreement(pair()[1].shards.ranks, "a test") as agreed:
            agreed.same(fact=1)
            if rank == 0:
                raise ValueError("too late")

    on_one(rank, (ValueError, "too late"), (RuntimeError, "rank 0 of.*too late"), agree)


def other_action(rank, size, folder):
    _, many = pair()
    H, t = torch.randn(2, d).double(), torch.arange(2)
    call = (lambda: many.predict(H)) if rank == 0 else (lambda: many(H, t))
    raises(RuntimeError, "same, but they began predict on rank 0, a loss on rank 1", call)


def integers_for_predictions(rank, size, folder, pair):
    """What every layer refuses at once is an error on all ranks in predictions, too."""
    _, many = pair()
    H, t = torch.randn(2, d).double(), torch.arange(2)
    given = {"log_prob": (), "topk": (1,), "predict": (), "rank": (t,)}
    for name, rest in given.items():
        for wrong in (H.long(), H[0, 0], [1.0]):
            mine = wrong if rank == 0 else H
            others = RuntimeError, "rank 0 of the process group refused.*hidden must"
            with torch.no_grad():
                call = partial(getattr(many, name), mine, *rest)
                on_one(rank, ((TypeError, ValueError), "hidden must"), others, call)
                getattr(many, name)(H, *rest)


def wrong_weight_for_predictions(rank, size, folder):
    _, many = pair()
    H = torch.randn(2, d).double()
    if rank == 0:
        many.bias = nn.Parameter(many.bias.detach().float())
    others = RuntimeError, "rank 0 of the process group refused.*bias"
    on_one(rank, (TypeError, "bias"), others, lambda: many.predict(H))


def heads_in_another_order(rank, size, folder, pair):
    heads = [pair()[1], pair()[1]]
    H, t = torch.randn(2, d).double(), torch.arange(2)
    words = "layer_that_is_called must be the same on all ranks"
    raises(ValueError, words, lambda: heads[int(rank == 0)](H, t))
    for head in heads:
        head(H, t).backward()


def refused_by_every_layer(pair):
    """Cases that each kind of layer has, by their names."""
    cases = integers_for_predictions, heads_in_another_order
    return {case.__name__: partial(case, pair=pair) for case in cases}


def state_of_computed_rows(rank, size, folder):
    """Neither saved nor loaded, since the state would have the rows of one rank alone."""
    for change, undo in (
        (nn.utils.parametrizations.weight_norm, nn.utils.parametrize.remove_parametrizations),
        (partial(prune.l1_unstructured, amount=0.5), prune.remove),
    ):
        one, many = pair()
        change(many, "weight")
        raises(RuntimeError, "cannot be saved for all ranks.*permanent", many.state_dict)
        load = partial(many.load_state_dict, one.state_dict())
        raises(RuntimeError, "cannot be loaded for all ranks.*permanent", load)
        undo(many, "weight")
        assert many.state_dict()["weight"].shape == (23, d)
        load()


def skipped_step(rank, size, folder):
    _, many = pair()
    optimizer = torch.optim.SGD(many.parameters(), lr=0.1)
    H, t = torch.randn(2, d).double(), torch.arange(2)
    many(H, t).backward()
    if rank:
        optimizer.step()
    raises(RuntimeError, "changed on some ranks.*but not on rank 0", lambda: many(H, t))


def unknown_average(rank, size, folder):
    """Nobody can see whether the trunk is in a DistributedDataParallel of its own."""
    _, many = pair()
    many.shards.averaged = None
    H, t = torch.randn(2, d, requires_grad=True, dtype=torch.float64), torch.arange(2)
    many(H, t).backward()
    if size > 1:
        raises(
            ValueError, "averaged=True if they are.*or with averaged=False", lambda: many(2 * H, t)
        )
    many.shards.averaged = False
    many(2 * H, t).backward()


def other_rows_replicated(rank, size, folder):
    _, many = pair(replicated=True)
    H, t = torch.randn(2, d).double(), torch.arange(2)
    raises(ValueError, "replicated_rows must be the same", lambda: many(H + rank, t))
    # of the same sum, weighted by the places
    others = torch.tensor([2, 0]) if rank == 0 else torch.tensor([0, 1])
    raises(ValueError, "replicated_rows must be the same", lambda: many(H, others))


def not_left_out(rank, size, folder):
    wrapped = DistributedDataParallel(LinearSphericalLoss(d, 4 * size, process_group=world()))
    raises(
        RuntimeError,
        "leave_out_of_ddp",
        lambda: wrapped(torch.randn(2, d), torch.arange(2)),
    )


def rows_sent_to_all(rank, size, folder, make=lambda size: pair(4 * size)[1]):
    """A wrapper sends the rows of one rank to all, and its forward is not what runs the head."""
    x, t = torch.randn(2, d).double(), torch.arange(2)
    head = make(size)
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
    head(x, t)  # equal rows that nobody sent
    head = make(size)
    wrapped = DistributedDataParallel(Model(head))
    for _ in range(2):  # it is refused again
        raises(
            RuntimeError,
            "have the same rows of the weight.*leave_out_of_ddp",
            lambda: head(wrapped.module.trunk(x).detach(), t),
        )


def fully_sharded(rank, size, folder):
    if not hasattr(torch.cpu.Stream, "record_event"):
        return  # this torch shards on no CPU
    from torch.distributed.fsdp import fully_shard

    _, many = pair()
    raises(TypeError, "sharded already.*ignored_params", lambda: fully_shard(many))


def rows_of_one_rank(rank, size, folder):
    one, many = pair()
    state = {name: x[:12] for name, x in one.state_dict().items()}
    raises(ValueError, "must have 23 rows", lambda: many.load_state_dict(state))


def state_of_another_rank(rank, size, folder):
    """As many rows as each rank has, from a file that one rank wrote for all."""
    many = LinearSphericalLoss(d, 4 * size, process_group=world())
    path, before = Path(folder) / "of one rank.pt", many.weight.clone()
    if rank == 0:
        torch.save(many.state_dict(), path)
    torch.distributed.barrier()
    state = torch.load(path, weights_only=False)
    words = "weight must have the rows of this rank"
    raises((ValueError, RuntimeError), words, lambda: many.load_state_dict(state))
    assert torch.equal(many.weight, before)


def replicated_loaded(rank, size, folder):
    """A DTensor that is not sharded by its rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    one, many = pair()
    mesh, state = init_device_mesh("cpu", (size,)), {}
    for name, x in one.state_dict().items():
        state[name] = DTensor.from_local(x, mesh, [Replicate()])
    raises(ValueError, "weight must be sharded by Shard.0.", lambda: many.load_state_dict(state))


def other_width_loaded(rank, size, folder):
    """A state that cannot be loaded on one rank is loaded on none."""
    one, many = pair()
    before = many.weight.clone()
    state = one.state_dict()
    state["weight"] = state["weight"][:, : d - 1] if rank == 0 else state["weight"] + 1
    words = "must have 5 columns"
    others = RuntimeError, f"rank 0 of.*{words}"
    on_one(rank, (ValueError, words), others, lambda: many.load_state_dict(state))
    assert torch.equal(many.weight, before)


def wrong_flag(rank, size, folder):
    def make():
        LinearSphericalLoss(d, 20, process_group=world(), replicated=1 if rank == 0 else False)

    on_one(rank, (TypeError, "replicated"), (RuntimeError, "rank 0 of.*replicated"), make)


def not_in_the_group(rank, size, folder):
    from torch.distributed.device_mesh import DeviceMesh

    for group in (torch.distributed.new_group([0]), DeviceMesh("cpu", [0])):
        make = partial(LinearSphericalLoss, d, 20, process_group=group)
        if rank:
            raises(ValueError, "must contain this process", make)
        else:
            make()


def mesh_of_two_dimensions(rank, size, folder):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    make = partial(LinearSphericalLoss, d, 20)
    raises(ValueError, "mesh of one dimension, got one of 2", partial(make, process_group=mesh))
    make(process_group=mesh["tp"])


def vector_assigned(rank, size, folder):
    _, many = pair(prior=torch.ones(23), weight=torch.ones(23))
    for name in ("prior", "class_weight"):
        for value in (torch.ones(23), None):
            raises(AttributeError, "cannot be assigned", partial(setattr, many, name, value))


def infinite(rank, size, folder):
    """Outputs that only the rank of their class has are an error on every rank."""
    _, many = pair()
    H = torch.ones(1, d).double() * (1e200 if rank == 0 else 1)
    for predict in (many.predict, partial(many.rank, target=torch.tensor([1]))):
        raises(ValueError, "infinite", lambda predict=predict: predict(H))


def state_of_columns(rank, size, folder):
    _, many = pair()
    optimizer = torch.optim.Adafactor(many.parameters())
    keep_whole_state(optimizer, many)
    many(torch.randn(2, d).double(), torch.arange(2)).backward()
    optimizer.step()
    raises(TypeError, "Adafactor keeps row_var.*single entries", optimizer.state_dict)


def lost_digits(rank, size, folder):
    """Kept statistics that have lost their digits on one rank."""
    _, many = pair(options=LinearSphericalOptions())
    words = "too few digits"
    with (
        patch("softsphere.engines.accumulation.loses_digits", lambda *x: rank == 0),
        many.accumulate(),
    ):
        call = partial(many, torch.randn(2, d).double(), torch.arange(2))
        on_one(rank, (RuntimeError, words), (RuntimeError, f"rank 0 of.*{words}"), call)


def mask_given(rank, size, folder):
    _, many = pair()
    H, t = torch.randn(2, d).double(), torch.arange(2)
    raises(TypeError, "mask cannot", lambda: many(H, t, mask=torch.ones(23, dtype=torch.bool)))


def logits_wanted(rank, size, folder):
    for given in ({"loss": "softmax"}, {"label_smoothing": 0.1}):
        raises(
            (TypeError, ValueError),
            "never makes the logits",
            lambda given=given: LinearSphericalLoss(d, 20, process_group=world(), **given),
        )


def second_derivative(rank, size, folder):
    _, many = pair()
    H = torch.randn(2, d).double().requires_grad_()
    loss = many(H, torch.arange(2))
    raises(RuntimeError, "first derivatives alone", lambda: _grad_of_grad(loss, H))


def _grad_of_grad(loss, H):
    torch.autograd.grad(loss, H, create_graph=True)


def gradient_of_prediction(rank, size, folder):
    _, many = pair()
    raises(RuntimeError, "no_grad", lambda: many.log_prob(torch.randn(2, d).double()))


def set_on_one(many, rank, **values):
    for name, value in values.items():
        if rank == 0:
            setattr(many, name, value)


def frozen(many, rank, name):
    getattr(many, name).requires_grad_(rank != 0)


H, T = torch.ones(2, d, dtype=torch.float64), torch.arange(2)
TWO, VALUES = torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.float64)


def accumulating(many, rank):
    with many.accumulate() if rank == 0 else contextlib.nullcontext():
        many(H, T)


# What differs on rank 0, by the name of the fact that says so on every rank.
DIFFERENT = {
    "loss": lambda many, rank: (set_on_one(many, rank, loss=Z), many(H, T)),
    "reduction": lambda many, rank: (set_on_one(many, rank, reduction="sum"), many(H, T)),
    "ignore_index": lambda many, rank: (set_on_one(many, rank, ignore_index=0), many(H, T)),
    "num_items": lambda many, rank: many(H, T, num_items=7 + rank),
    "shape_of_targets": lambda many, rank: many(
        H, TWO[:, : 1 + (rank == 0)], VALUES[:, : 1 + (rank == 0)]
    ),
    "target_values": lambda many, rank: (
        many(H, TWO[:, :1], VALUES[:, :1]) if rank == 0 else many(H, T)
    ),
    "hidden_requires_grad": lambda many, rank: many(H.clone().requires_grad_(rank == 0), T),
    "replicated": lambda many, rank: (
        set_on_one(many.shards, rank, replicated=True),
        many(H, T),
    ),
}
OF_LINEAR = {
    "options": lambda many, rank: (
        set_on_one(many, rank, options=LinearSphericalOptions(engine="dense")),
        many(H, T),
    ),
    "accumulates": accumulating,
    "trained": lambda many, rank: (frozen(many, rank, "bias"), many(H, T)),
}


def refuses_another(fact, call, many, rank):
    raises(ValueError, f"^{fact} must be the same on all ranks", lambda: call(many, rank))


def differs(rank, size, folder, fact):
    refuses_another(fact, {**DIFFERENT, **OF_LINEAR}[fact], pair()[1], rank)


REFUSED = (
    refused_by_every_layer(pair)
    | {f"other {fact}": partial(differs, fact=fact) for fact in (*DIFFERENT, *OF_LINEAR)}
    | {
        case.__name__: case
        for case in (
            unowned_target,
            other_number_of_classes,
            other_prior,
            wrong_on_one,
            late_error,
            other_action,
            wrong_weight_for_predictions,
            state_of_computed_rows,
            skipped_step,
            unknown_average,
            other_rows_replicated,
            not_left_out,
            rows_sent_to_all,
            fully_sharded,
            rows_of_one_rank,
            state_of_another_rank,
            replicated_loaded,
            other_width_loaded,
            wrong_flag,
            not_in_the_group,
            mesh_of_two_dimensions,
            vector_assigned,
            infinite,
            state_of_columns,
            lost_digits,
            mask_given,
            logits_wanted,
            second_derivative,
            gradient_of_prediction,
        )
    }
)
