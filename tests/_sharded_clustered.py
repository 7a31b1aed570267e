"""What a ClusteredLoss does on several ranks, beside one without a process group.

The file is long, since all cases run in one process group, which is slow to start.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from _clustered import ASSIGNMENTS
from _ranks import EPS, TIGHT, Adam, rows_of, world
from _sharded_linear import (
    COUNTS,
    DIFFERENT,
    H,
    T,
    below_data_parallel,
    below_fully_sharded,
    d,
    frozen,
    on_one,
    raises,
    refused_by_every_layer,
    refuses_another,
    set_on_one,
    step_both,
)
from _sharded_linear import (
    rows_sent_to_all as sent_to_all,
)
from softsphere import ClusteredLoss
from softsphere.losses import SphericalSoftmax
from softsphere.parallel import Owners, clip_grad_norm_, count_traffic, keep_whole_state

D = 23
# a shortlist of 5 classes, four clusters of 1 to 8 classes, and an empty one
SIZES = (5, 3, 8, 0, 6, 1)
torch.manual_seed(0)
ASSIGNMENT = torch.cat([torch.full((n,), i - 1) for i, n in enumerate(SIZES)])[torch.randperm(D)]


def pair(replicated=False, assignment=ASSIGNMENT, counts=None, **given):
    """A layer without a group and one with, of the same weights."""
    D = len(assignment)
    given = {"dtype": torch.float64, **given}
    given["counts"] = torch.arange(1.0, D + 1) if counts else None
    one = ClusteredLoss(d, D, assignment, **given)
    if one.root.bias is not None:  # that of an empty cluster would hide it
        nn.init.normal_(one.root.bias)
    many = ClusteredLoss(d, D, assignment, **given, process_group=world(), replicated=replicated)
    many.load_state_dict(one.state_dict())
    many.shards.averaged = False  # many cases take rows from a larger tensor
    return one, many


def same_rows(one, many):
    want, clusters = one.state_dict(), many.clusters
    got = {name: getattr(x, "to_local", lambda x=x: x)() for name, x in many.state_dict().items()}
    assert list(got) != [] and set(got) == set(want)
    torch.testing.assert_close(many.root.weight, one.root.weight[clusters.root.slice], **TIGHT)
    for name, x in want.items():
        if name in ("weight", "bias", "prior"):
            # a DTensor has equal numbers of leaves
            x = x[even(len(x), many)]
        elif name in ("root.weight", "root.bias"):
            x = x[clusters.root.slice]
        torch.testing.assert_close(got[name], x, **TIGHT)
    if many.engine != "factored":
        torch.testing.assert_close(many.weight, one.weight[clusters.leaves()], **TIGHT)
    if many.project is not None:
        same_bits(many.project.weight, many)


def even(total, many):
    from softsphere.parallel import Sharding

    return Sharding(total, many.shards.ranks.size, many.shards.ranks.rank).slice


def same_bits(x, many):
    each = many.shards.ranks.gather(x)
    assert all(torch.equal(other, each[0]) for other in each)


def train(
    rank,
    size,
    folder,
    steps=3,
    replicated=False,
    make=None,
    given=COUNTS,
    assignment=ASSIGNMENT,
    **options,
):
    """Loss, gradient of hidden and weights of every step."""
    heads = pair(replicated, assignment, **options)
    make = make or partial(torch.optim.SGD, momentum=0.9)
    optimizers = [make(head.parameters(), lr=0.1) for head in heads]
    for _ in range(steps):
        step_both(rank, heads, optimizers, replicated, False, given[:size])
        same_rows(*heads)


def predicted(rank, size, folder, replicated=False, assignment=ASSIGNMENT, **options):
    one, many = pair(replicated, assignment, **options)
    D, m = len(assignment), sum(COUNTS[:size])
    state = one.state_dict()
    # the first two classes of the shortlist are twins, and so are those of each cluster, which have
    # the same rows in all clusters
    for name, starts in (("weight", one.grouping.starts[:-1]), ("root.weight", torch.tensor([0]))):
        bias = name.replace("weight", "bias")
        for start in starts[: len(state[name])].tolist():
            state[name][start : start + 2] = state[name][:1].clone()
            state[bias][start : start + 2] = state[bias][:1].clone()
    one.load_state_dict(state)
    many.load_state_dict(one.state_dict())
    rows = slice(None) if replicated else rows_of(rank, COUNTS[:size])
    H, target = 3 * torch.randn(m, d).double(), torch.randint(D, (m,))
    target[0] = one.grouping.leaves[0] if len(one.grouping.leaves) else 0
    out, h = torch.randint(-1, D, (m, 2)), H[rows]
    out[0] = -1
    want = one.log_prob(H).detach()
    with torch.no_grad():
        torch.testing.assert_close(many.log_prob(h), want[rows], **TIGHT)
        some = torch.tensor([D - 1, 0, 3])
        torch.testing.assert_close(many.log_prob(h, some), want[rows][:, some], **TIGHT)
    assert torch.equal(many.rank(h, target[rows]), one.rank(H, target)[rows])
    for k, exclude in ((6, None), (6, out), (D - 2, out)):
        best = one.topk(H, k, exclude)
        got = many.topk(h, k, None if exclude is None else exclude[rows])
        torch.testing.assert_close(got.values, best.values[rows], **TIGHT)
        # the scores of twins may be in either order
        torch.testing.assert_close(want[rows].gather(1, got.indices), got.values, **TIGHT)
        if exclude is not None:
            assert not (got.indices.unsqueeze(2) == exclude[rows].unsqueeze(1)).any()
    torch.testing.assert_close(
        want[rows].gather(1, many.predict(h).unsqueeze(1)).squeeze(1), want[rows].amax(1), **TIGHT
    )


def count_given(rank, size, folder):
    one, many = pair()
    rows, m = rows_of(rank, COUNTS[:size]), sum(COUNTS[:size])
    H, t = torch.randn(m, d).double(), torch.arange(m)
    torch.testing.assert_close(many(H[rows], t[rows], num_items=7), one(H, t) * m / 7, **TIGHT)


def half_precision(rank, size, folder, dtype, mixed):
    """A layer in half precision, or in float32 under autocast; hidden has two leading sizes."""
    heads = pair(dtype=torch.float32 if mixed else dtype, counts=True, leaf_features=3)
    m, own = sum(COUNTS[:size]), rows_of(rank, COUNTS[:size])
    H, t, found = torch.randn(m, 1, d).to(heads[0].weight.dtype), torch.randint(D, (m, 1)), []
    for head, rows in zip(heads, (slice(None), own), strict=True):
        h = H[rows].clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=mixed):
            loss = head(h, t[rows])
        loss.backward()
        found.append((loss, h.grad, head.project.weight.grad))
    (want, by_h, by_project), (got, by_own, also) = found
    near = {"rtol": 0.05, "atol": 0.02}
    for x, y in ((got, want), (by_own, by_h[own]), (also, by_project)):
        torch.testing.assert_close(x, y, **near)


def without_rows(rank, size, folder):
    """The mean of no rows at all."""
    _, many = pair(leaf_features=2)
    h, t = torch.zeros(0, d, requires_grad=True, dtype=torch.float64), torch.zeros(0).long()
    loss = many(h, t)
    loss.backward()
    assert loss.isnan() and h.grad.shape == (0, d)
    assert many.predict(h).shape == (0,) and many.topk(h, 2).values.shape == (0, 2)


def clipped(rank, size, folder, **options):
    heads = pair(leaf_features=3, **options)
    m, own = sum(COUNTS[:size]), rows_of(rank, COUNTS[:size])
    H, t = torch.randn(m, d).double(), torch.randint(D, (m,))
    heads[0](H, t).backward()
    heads[1](H[own], t[own]).backward()
    want = nn.utils.clip_grad_norm_(heads[0].parameters(), 0.1)
    torch.testing.assert_close(clip_grad_norm_(heads[1], 0.1).double(), want, rtol=1e-5, atol=0)
    for head in heads:
        torch.optim.SGD(head.parameters(), lr=1.0).step()
    same_rows(*heads)


def whole(state):
    """A state with whole tensors in the place of DTensors."""
    return {k: getattr(x, "full_tensor", lambda x=x: x)() for k, x in state.items()}


def saved(rank, size, folder, make=Adam, **options):
    """Weights and momentum of several ranks, loaded by others and by one process."""
    one, many = heads = pair(leaf_features=2, counts=True, **options)
    others = pair(leaf_features=2, counts=True, **options)
    m, own = sum(COUNTS[:size]), rows_of(rank, COUNTS[:size])
    optimizers = [make(x.parameters(), lr=0.1) for x in (one, many, *others)]
    for head, optimizer in zip((many, others[1]), optimizers[1::2], strict=True):
        keep_whole_state(optimizer, head)
    H, t = torch.randn(m, d).double(), torch.randint(D, (m,))
    for optimizer, head in zip(optimizers, (*heads, *others), strict=True):
        rows = own if head.shards is not None else slice(None)
        head(H[rows], t[rows]).backward()
        optimizer.step()

    def state_of(head, optimizer):
        packed = optimizer.state_dict()["state"]
        return {"head": head.state_dict(), "optimizer": {str(k): x for k, x in packed.items()}}

    path, state = Path(folder) / f"clustered-{many.engine}", state_of(others[1], optimizers[3])
    dcp.save(state_of(many, optimizers[1]), checkpoint_id=path)
    if rank == 0:  # for test_a_checkpoint_of_clusters_loads_in_one_process
        torch.save(one.state_dict(), f"{path}.pt")
    dcp.load(state, checkpoint_id=path)
    many.load_state_dict(state["head"])
    packed = optimizers[3].state_dict()
    packed["state"] = {int(k): x for k, x in state["optimizer"].items()}
    # what was saved is in another layer with other values, and in one without a group
    others[1].load_state_dict(state["head"])
    optimizers[3].load_state_dict(packed)
    others[0].load_state_dict(whole(many.state_dict()))
    same_rows(one, others[1])
    same_rows(others[0], many)
    for optimizer, head in ((optimizers[0], one), (optimizers[3], others[1])):
        rows = own if head.shards is not None else slice(None)
        optimizer.zero_grad()
        head(H[rows], t[rows]).backward()
        optimizer.step()
    same_rows(one, others[1])


def traffic_of_a_step(classes, clusters):
    assignment = torch.arange(classes) % (clusters + 2) - 2
    assignment = assignment.clamp_min(-1)
    head = ClusteredLoss(d, classes, assignment, leaf_features=2, process_group=world())
    with count_traffic() as traffic:
        head(torch.randn(4, d, requires_grad=True), torch.arange(4)).backward()
    return traffic.calls


def traffic_is_flat(rank, size, folder):
    """The numbers that the page on many processes has."""
    M, n, width = 4, size, 2
    want = [
        ("all_gather", 208),
        ("all_gather", 8 * M),
        ("all_gather", 4 * M * d),
        ("all_to_all", 12 * n * M),
        ("all_gather", 8),
        ("all_to_all", 12 * n * M),
        ("all_to_all", 4 * n * M * d),
        ("all_gather", 4 * d * width),
    ]
    assert sorted(traffic_of_a_step(10, 3)) == sorted(want)
    assert traffic_of_a_step(10, 3) == traffic_of_a_step(1000, 50)


def started_apart(rank, size, folder):
    """Ranks draw other rows and the same projection, and go on with the same numbers."""
    torch.manual_seed(rank)
    head = ClusteredLoss(
        d, 4 * size, torch.arange(4 * size) // 4, leaf_features=2, process_group=world()
    )
    same_bits(head.project.weight, head)
    assert len(head.weight) == 4 and len(head.shards.ranks.gather(head.weight).unique()) == 8 * size
    torch.manual_seed(0)
    head.reset_parameters()
    same_bits(torch.rand(1), head)


def made_alike(rank, size, folder):
    """Before anything is loaded, a rank has the frequencies of its own classes."""
    given = {"counts": torch.arange(1.0, D + 1), "dtype": torch.float64}
    one = ClusteredLoss(d, D, ASSIGNMENT, **given)
    many = ClusteredLoss(d, D, ASSIGNMENT, **given, process_group=world())
    assert torch.equal(many.base_measure, one.prior[many.clusters.leaves()])
    assert torch.equal(many.root.bias, one.root.bias[many.clusters.root.slice])


def rows_copied(rank, size, folder):
    one, many = pair()
    rows = torch.randn(D, d)
    one.copy_rows(rows)
    many.copy_rows(rows)
    same_rows(one, many)
    words = "the rows of a layer with a process_group cannot be tied"
    raises(ValueError, words, lambda: many.rows(torch.tensor([0])))


def copied(rank, size, folder):
    one, many = pair(counts=True, leaf_features=2)
    H, t = torch.randn(4, d).double(), torch.arange(4)
    own = rows_of(rank, [4, *[0] * (size - 1)])
    torch.testing.assert_close(copy.deepcopy(many)(H[own], t[own]), one(H, t), **TIGHT)
    torch.testing.assert_close(
        many.float()(H[own].float(), t[own]).double(), one(H, t), rtol=1e-4, atol=0
    )


def balanced(rank, size, folder):
    """The ranks have equal shares of the counts, and not of the clusters or the classes."""
    assignment = torch.arange(8).repeat_interleave(3)
    counts = torch.where(assignment == 2, 1000, 1)
    head = ClusteredLoss(d, 24, assignment, counts=counts, process_group=world())
    found = head.shards.ranks.gather(torch.tensor(len(head.weight))).tolist()
    if size > 1:
        assert found[0] == 3 and max(found[1:]) - min(found[1:]) <= 3
    assert sum(found) == 24


class SparseAdam(torch.optim.SparseAdam):
    """SparseAdam of the leaves, and SGD of the other parameters."""

    def __init__(self, parameters, lr):
        parameters = list(parameters)
        super().__init__(parameters[:1], lr, eps=EPS)
        self.other = torch.optim.SGD(parameters[1:], lr)

    def step(self):
        super().step()
        self.other.step()

    def zero_grad(self):
        super().zero_grad()
        self.other.zero_grad()


def sparse_steps(rank, size, folder):
    """Steps in which ranks without targets leave their leaves as they are."""
    one, many = heads = pair(sparse=True)
    optimizers = [SparseAdam(head.parameters(), lr=0.1) for head in heads]
    for c in (0, 1, 2, 4, 4):
        H, t = torch.randn(2, d).double(), one.grouping.leaves[one.grouping.starts[c]].expand(2)
        own = rows_of(rank, [2, *[0] * (size - 1)])
        for head, rows, optimizer in zip(heads, (slice(None), own), optimizers, strict=True):
            optimizer.zero_grad()
            head(H[rows], t[rows]).backward()
            optimizer.step()
    same_rows(one, many)


RIGHT = {
    "momentum": train,
    "adam, counts": partial(train, make=Adam, counts=True),
    "softmax, projected": partial(train, leaf="softmax", leaf_features=3, counts=True),
    "replicated, projected": partial(train, replicated=True, leaf_features=3),
    "rows, no bias": partial(train, reduction="none", bias=False, engine="gram"),
    "sum, logits": partial(train, reduction="sum", engine="logits", counts=True),
    "a rank without rows": partial(train, given=(4, 0, 3, 2), leaf_features=3, counts=True),
    "sparse": partial(train, sparse=True, make=partial(torch.optim.SGD, momentum=0)),
    "sparse adam": sparse_steps,
    "factored": partial(train, engine="factored", make=torch.optim.SGD, counts=True),
    "factored, few clusters": partial(
        train, assignment=ASSIGNMENTS["one cluster"], engine="factored", make=torch.optim.SGD
    ),
    "predict": partial(predicted, counts=True),
    "predict, projected": partial(predicted, leaf="softmax", leaf_features=3),
    "predict, replicated": partial(predicted, replicated=True, counts=True),
    "predict, factored": partial(predicted, engine="factored", counts=True),
    "predict, one cluster": partial(predicted, assignment=ASSIGNMENTS["one cluster"]),
    "predict, all shortlist": partial(predicted, assignment=ASSIGNMENTS["all shortlist"]),
    "a count": count_given,
    "half precision": partial(half_precision, dtype=torch.bfloat16, mixed=False),
    "mixed precision": partial(half_precision, dtype=torch.bfloat16, mixed=True),
    "no rows": without_rows,
    "data parallel": partial(
        below_data_parallel, pair=partial(pair, leaf_features=2), same_rows=same_rows
    ),
    "fully sharded below": partial(
        below_fully_sharded, pair=partial(pair, leaf_features=2), same_rows=same_rows
    ),
    "data parallel trunk": partial(
        below_data_parallel, whole=False, pair=partial(pair, leaf_features=2), same_rows=same_rows
    ),
    "data parallel, checkpoint": partial(
        below_data_parallel, reentrant=True, pair=pair, same_rows=same_rows
    ),
    "clipped": clipped,
    "clipped, factored": partial(clipped, engine="factored", counts=True),
    "saved": saved,
    "saved, factored": partial(saved, make=torch.optim.SGD, engine="factored"),
    "traffic": traffic_is_flat,
    "start": started_apart,
    "made": made_alike,
    "rows copied": rows_copied,
    "copied": copied,
    "balanced": balanced,
    **{
        f"assignment: {name}": partial(train, assignment=x, steps=1, leaf_features=2)
        for name, x in ASSIGNMENTS.items()
    },
}
LONG = {
    "momentum": partial(train, steps=100, counts=True, leaf_features=4),
    "optimizer": partial(train, steps=100, make=Adam),
}


def other_assignment(rank, size, folder):
    def make():
        assignment = ASSIGNMENT.roll(int(rank == 0))
        ClusteredLoss(d, D, assignment, process_group=world())

    raises(ValueError, "assignment must be the same on all ranks", make)


def other_counts(rank, size, folder):
    def make():
        counts = torch.ones(D) + torch.arange(D) * (rank == 0)
        ClusteredLoss(d, D, ASSIGNMENT, counts=counts, process_group=world())

    raises(ValueError, "counts must be the same on all ranks", make)


def other_number_of_classes(rank, size, folder):
    def make():
        n = D - (rank == 0)
        ClusteredLoss(d, n, ASSIGNMENT[:n], process_group=world())

    raises(ValueError, "num_classes must be the same on all ranks", make)


def other_owners(rank, size, folder):
    """Machines that round otherwise may give a cluster to another rank."""
    real = Owners.balanced

    def balanced(loads, size, own):
        found = real(loads, size, own)
        return Owners(found.owner.flip(0), size, own) if rank == 0 else found

    with patch.object(Owners, "balanced", balanced):
        make = partial(ClusteredLoss, d, D, ASSIGNMENT, process_group=world())
        raises(ValueError, "owners_of_clusters must be the same on all ranks", make)


def unowned_target(rank, size, folder):
    _, many = pair()
    H, t = torch.randn(2, d).double(), torch.tensor([3, D if rank == 0 else 4])
    words = r"target must be in \[0, 23\)"
    others = RuntimeError, f"rank 0 of the process group refused.*{words}"
    on_one(rank, (ValueError, words), others, lambda: many(H, t))
    many(H, t.clamp(max=4)).backward()


def skipped_step(rank, size, folder, part):
    """A step of a part of the layer that one rank leaves out."""
    assignment = torch.arange(8 * size) // 4 - 1  # every rank has rows of both parts
    _, many = pair(assignment=assignment)
    optimizer = torch.optim.SGD([many.get_parameter(part)], lr=0.1)
    H, t = torch.randn(2, d).double(), torch.arange(2)
    many(H, t).backward()
    if rank:
        optimizer.step()
    raises(RuntimeError, "changed on some ranks.*but not on rank 0", lambda: many(H, t))


def other_projection(rank, size, folder):
    _, many = pair(leaf_features=2)
    with torch.no_grad():
        many.project.weight[0, 0] += rank
    H, t = torch.randn(2, d).double(), torch.arange(2)
    raises(ValueError, "bits_of_the_projection must be the same", lambda: many(H, t))


OF_EVERY_RANK = ("project.weight", "root_shares")


def other_state(rank, size, folder, name):
    """A state that cannot be loaded on one rank is loaded on none."""
    one, many = pair(leaf_features=2)
    before = {k: x.clone() for k, x in many.named_parameters()}
    state = {k: x + 1 if x.is_floating_point() else x for k, x in one.state_dict().items()}
    if rank == 0:
        state[name] = state[name][:-1] if name != "assignment" else state[name].roll(1)
    words = f"{name} must have .* rows"
    if name in OF_EVERY_RANK:
        words = f"{name} must have shape"
    elif name == "assignment":
        words = "assignment is not the one"
    others = RuntimeError, f"rank 0 of.*{words}"
    on_one(rank, (ValueError, words), others, lambda: many.load_state_dict(state))
    assert all(torch.equal(x, before[k]) for k, x in many.named_parameters())


def optimizer_of_one(rank, size, folder):
    """A state of an optimizer that one rank cannot load is an error on every rank."""
    one, many = pair()
    optimizers = [Adam(x.parameters()) for x in (one, many)]
    keep_whole_state(optimizers[1], many)
    for head, optimizer in zip((one, many), optimizers, strict=True):
        head(torch.randn(2, d).double(), torch.arange(2)).backward()
        optimizer.step()
    state = optimizers[0].state_dict()
    if rank == 0:
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][1:]
    words = "exp_avg must have 18 rows"
    others = RuntimeError, f"rank 0 of.*{words}"
    on_one(rank, (ValueError, words), others, lambda: optimizers[1].load_state_dict(state))


def infinite(rank, size, folder):
    _, many = pair()
    H = torch.ones(1, d).double() * (1e200 if rank == 0 else 1)
    calls = (
        many.predict,
        partial(many.rank, target=torch.tensor([1])),
        many.log_prob,
        partial(many.log_prob, classes=torch.arange(D)),
    )
    for predict in calls:
        with torch.no_grad():
            raises(ValueError, "infinite", lambda predict=predict: predict(H))


def gradient_of_prediction(rank, size, folder):
    _, many = pair()
    raises(RuntimeError, "no_grad", lambda: many.log_prob(torch.randn(2, d).double()))


def not_left_out(rank, size, folder):
    assignment = torch.arange(4 * size) // 4
    wrapped = DistributedDataParallel(ClusteredLoss(d, 4 * size, assignment, process_group=world()))
    raises(RuntimeError, "leave_out_of_ddp", lambda: wrapped(torch.randn(2, d), torch.arange(2)))


def rows_sent_to_all(rank, size, folder):
    sent_to_all(rank, size, folder, lambda size: pair(assignment=torch.arange(4 * size) // 4)[1])


def fully_sharded(rank, size, folder):
    if not hasattr(torch.cpu.Stream, "record_event"):
        return  # this torch shards on no CPU
    from torch.distributed.fsdp import fully_shard

    for module in (pair()[1], pair()[1].root):
        raises(TypeError, "sharded already.*ignored_params", partial(fully_shard, module))


# What differs on rank 0, by the name of the fact that says so on every rank.
OTHERS = {
    fact: call
    for fact, call in DIFFERENT.items()
    if fact not in ("loss", "target_values", "shape_of_targets")
} | {
    "loss": lambda many, rank: (set_on_one(many, rank, loss=SphericalSoftmax()), many(H, T)),
    "engine": lambda many, rank: (set_on_one(many, rank, engine="gram"), many(H, T)),
    "trained": lambda many, rank: (frozen(many, rank, "bias"), many(H, T)),
}


def differs(rank, size, folder, fact):
    refuses_another(fact, OTHERS[fact], pair()[1], rank)


REFUSED = {
    **refused_by_every_layer(pair),
    **{f"other {fact}": partial(differs, fact=fact) for fact in OTHERS},
    **{
        f"skipped step of {part}": partial(skipped_step, part=part)
        for part in ("root.weight", "weight")
    },
    **{
        f"other {name} loaded": partial(other_state, name=name)
        for name in ("weight", "root.bias", "assignment", *OF_EVERY_RANK)
    },
} | {
    case.__name__: case
    for case in (
        other_assignment,
        other_counts,
        other_owners,
        other_number_of_classes,
        unowned_target,
        other_projection,
        optimizer_of_one,
        infinite,
        gradient_of_prediction,
        not_left_out,
        rows_sent_to_all,
        fully_sharded,
    )
}
