"""What a FactoredSphericalLoss does on several ranks, beside one without a process group."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from _ranks import TIGHT, rows_of, world
from _recorded_graph import pretend_a_gpu
from _sharded_linear import (
    COUNTS,
    DIFFERENT,
    below_data_parallel,
    d,
    frozen,
    on_one,
    raises,
    refused_by_every_layer,
    refuses_another,
    step_both,
)
from softsphere import FactoredSphericalLoss
from softsphere.matrix import safeguard
from softsphere.optim import FactoredSGD
from softsphere.parallel import clip_grad_norm_, count_traffic


def pair(D=23, replicated=False, **given):
    given = {"dtype": torch.float64, **given}
    if given.pop("prior", False):
        given["prior"] = torch.arange(1.0, D + 1)
    one = FactoredSphericalLoss(d, D, **given)
    many = FactoredSphericalLoss(d, D, **given, process_group=world(), replicated=replicated)
    many.load_state_dict(one.state_dict())
    many.shards.averaged = False  # many cases take rows from a larger tensor
    return one, many


def same_rows(one, many):
    torch.testing.assert_close(many.dense(), one.dense()[many.shards.sharding.slice], **TIGHT)


def same_bits(many):
    """The small arrays are equal bit for bit on all ranks."""
    W, ranks = many.matrix.arrays, many.shards.ranks
    for x in (W.U, W.U_inv, W.omega, W.centred_gram, W.colsum, W.generations.maps):
        each = ranks.gather(x)
        assert all(torch.equal(other, each[0]) for other in each)


def train(
    rank,
    size,
    folder,
    D=23,
    steps=4,
    replicated=False,
    sparse=False,
    lr=2.0,
    clip=None,
    counts=COUNTS,
    **given,
):
    momentum = given.pop("momentum", None)
    one, many = heads = pair(D, replicated, **given)
    if momentum is None:
        optimizers = [torch.optim.SGD(x.parameters(), lr=lr) for x in heads]
    else:
        given = {"momentum": momentum, "weight_decay": 1e-3, "nesterov": True}
        optimizers = [FactoredSGD(x.parameters(), lr=lr / 10, **given) for x in heads]

    def clipped(head):
        if clip is None:
            return 0.0
        return nn.utils.clip_grad_norm_(head.parameters(), clip).as_subclass(torch.Tensor)

    for step in range(steps):
        step_both(rank, heads, optimizers, replicated, sparse, counts[:size], clipped)
        if step % 3 == 2:
            one.matrix.renew_(), many.matrix.renew_()
    same_rows(one, many)
    same_bits(many)
    one.matrix.mend_(), many.matrix.mend_()
    assert many.health().gram_drift < 1e-9
    same_bits(many)


def sums_forgotten_on_one(rank, size, folder):
    """Sums over all rows are computed anew on every rank where one of them has lost them."""
    one, many = pair()
    H, t = torch.randn(2 * size, d).double(), torch.arange(2 * size)
    own = rows_of(rank, (2,) * size)
    many(H[own], t[own])
    if rank == 0:
        many.weight.matrix.arrays.forget_gram()
    torch.testing.assert_close(many(H[own], t[own]), one(H, t), **TIGHT)


def lost_digits(rank, size, folder):
    """Rows of one rank alone are nearly orthogonal to a very large direction of the weight."""
    one, many = pair(dtype=torch.float32, prior=True)
    v = nn.functional.normalize(torch.randn(d), dim=0)
    W = 1000 * torch.outer(torch.randn(23), v) + 0.1 * torch.randn(23, d)
    for head in (one, many):
        head.load_state_dict({**one.state_dict(), "weight": W})
    exact = one.double()
    H, t = torch.randn(2 * size, d), torch.arange(2 * size)
    H += torch.outer(3 * (torch.arange(2 * size) >= 2) - H @ v, v)
    own = rows_of(rank, (2,) * size)
    given = H[own].clone().requires_grad_(), H.double().requires_grad_()
    many(given[0], t[own]).backward()
    exact(given[1], t).backward()
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(given[0].grad.double(), given[1].grad[own], **close)
    with torch.no_grad():
        want = exact.log_prob(H.double())[own]
        torch.testing.assert_close(many.log_prob(H[own]).double(), want, **close)


def predicted(rank, size, folder, D=23, replicated=False, **given):
    one, many = pair(D, replicated, **given)
    m = sum(COUNTS[:size])
    rows = slice(None) if replicated else rows_of(rank, COUNTS[:size])
    H, target, out = (
        3 * torch.randn(m, d).double(),
        torch.randint(D, (m,)),
        torch.randint(D, (m, 1)),
    )
    h = H[rows]
    assert torch.equal(many.predict(h), one.predict(H)[rows])
    assert torch.equal(many.rank(h, target[rows]), one.rank(H, target)[rows])
    want, got = one.topk(H, 2, out), many.topk(h, 2, out[rows])
    torch.testing.assert_close(got.values, want.values[rows], **TIGHT)
    assert torch.equal(got.indices, want.indices[rows])
    with torch.no_grad():
        torch.testing.assert_close(many.log_prob(h), one.log_prob(H)[rows], **TIGHT)


def clipped_with_others(rank, size, folder):
    """The norm of a factored gradient is the whole one on every rank."""
    one, many = pair()
    m, own = sum(COUNTS[:size]), rows_of(rank, COUNTS[:size])
    H, t = torch.randn(m, d).double(), torch.randint(23, (m,))
    one(H, t).backward()
    many(H[own], t[own]).backward()
    want = nn.utils.clip_grad_norm_(one.parameters(), 0.1).as_subclass(torch.Tensor)
    torch.testing.assert_close(clip_grad_norm_(many, 0.1).double(), want, rtol=1e-5, atol=0)


def saved(rank, size, folder):
    one, many = pair(prior=True)
    _, other = pair(prior=True)
    for head in (one, many):
        optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
        torch.manual_seed(3)
        H, t = torch.randn(4, d).double(), torch.arange(4)
        rows = slice(None) if head is one else rows_of(rank, [4, *[0] * (size - 1)])
        head(H[rows], t[rows]).backward()
        optimizer.step()
    dcp.save(many.state_dict(), checkpoint_id=Path(folder) / "factored")
    state = other.state_dict()
    dcp.load(state, checkpoint_id=Path(folder) / "factored")
    other.load_state_dict(state)
    same_rows(one, other)


def traffic_of_a_step(D):
    head = FactoredSphericalLoss(d, D, process_group=world())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with count_traffic() as traffic:
            head(torch.randn(4, d, requires_grad=True), torch.arange(4)).backward()
            optimizer.step()
    return traffic.calls


def traffic_is_flat(rank, size, folder):
    assert traffic_of_a_step(10) == traffic_of_a_step(1000)


def copied(rank, size, folder):
    import copy

    one, many = pair(prior=True)
    other = copy.deepcopy(many)
    H, t = torch.randn(4, d).double(), torch.arange(4)
    own = rows_of(rank, [4, *[0] * (size - 1)])
    torch.testing.assert_close(other(H[own], t[own]), one(H, t), **TIGHT)
    torch.testing.assert_close(many.float()(H[own], t[own]).double(), one(H, t), rtol=1e-4, atol=0)


RIGHT = {
    "plain": train,
    "momentum": partial(train, momentum=0.9),
    "momentum, prior": partial(train, momentum=0.5, prior=True, replicated=True),
    "fewer classes than ranks": partial(train, D=2, lr=0.1),
    "replicated": partial(train, replicated=True),
    "centred": partial(train, loss="bohning_bound", lr=0.5),
    "sparse, prior": partial(train, sparse=True, prior=True, lr=0.5),
    "rows": partial(train, reduction="none", lr=0.1),
    "sum, no bias": partial(train, reduction="sum", bias=False, lr=0.1),
    "clipped": partial(train, clip=0.01),
    "predict": predicted,
    "predict, few classes": partial(predicted, D=4, prior=True),
    "predict, replicated": partial(predicted, replicated=True),
    "a rank without rows": partial(train, counts=(4, 0, 3, 2), prior=True, lr=0.5),
    "lost digits on one": lost_digits,
    "sums forgotten on one": sums_forgotten_on_one,
    "clipped with others": clipped_with_others,
    "data parallel": partial(below_data_parallel, pair=pair, same_rows=same_rows),
    "data parallel, reentrant checkpoint": partial(
        below_data_parallel, pair=pair, same_rows=same_rows, reentrant=True
    ),
    "saved": saved,
    "traffic": traffic_is_flat,
    "copied": copied,
}


LONG = {
    "plain": partial(train, steps=100),
    "momentum, prior": partial(train, momentum=0.9, prior=True, steps=100),
}


def trained(lr=1.0, step=True, many=None):
    many = pair()[1] if many is None else many
    optimizer = torch.optim.SGD(many.parameters(), lr=lr)
    H, t = torch.randn(2, d).double(), torch.arange(2)
    many(H, t).backward()
    if step:
        optimizer.step()
    return lambda: many(H, t)


def error_after_an_undone_step(rank, size, folder, call, words):
    """The step is finished by all ranks together, before one of them refuses what it was given."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_a_gpu(patch)
        patch.setattr(safeguard, "_lasts", lambda *_: torch.tensor(False))
        _, many = pair(prior=True)
        H, t = torch.randn(2, d).double(), torch.arange(2)
        optimizer, W = torch.optim.SGD(many.parameters(), lr=1.0), many.matrix.arrays
        for _ in range(9):
            many(H, t).backward()
            optimizer.step()
            optimizer.zero_grad()
            if W.unfinished is not None:  # after some steps the factors are measured
                break
        assert W.unfinished is not None and bool(many.matrix.watch.undone)
        mine, others = (Exception, words), (RuntimeError, f"rank 0 .*refused.*{words}")
        on_one(rank, mine, others, lambda: call(many, H[:, 1:] if rank == 0 else H, t))
        assert W.unfinished is None
        same_bits(many)
        many(H, t)


@torch.no_grad()
def predict(many, H, t):
    return many.log_prob(H)


def load(many, H, t):
    return many.load_state_dict({"weight": torch.ones(23, H.shape[1])}, strict=False)


AFTER_AN_UNDONE_STEP = {
    "a loss": (nn.Module.__call__, "hidden"),
    "a prediction": (predict, "hidden"),
    "a state": (load, "columns"),
}


def state_of_one_rank(rank, size, folder):
    """It would have the factors rewritten on that rank alone."""
    _, many = pair()
    call = trained(many=many)
    action = many.state_dict if rank == 0 else call
    raises(RuntimeError, r"they began state_dict\(\) on rank 0, a loss on rank 1", action)
    call()


def state_of_a_replaced_weight(rank, size, folder):
    _, many = pair()
    if rank == 0:
        many.weight = nn.Parameter(torch.ones(2, 2))
    mine, others = (TypeError, "must be a .*FactoredTensor"), (RuntimeError, "rank 0 .*refused")
    on_one(rank, mine, others, many.state_dict)


def trained_on_one(many, rank):
    frozen(many, rank, "weight")
    many(torch.ones(2, d).double(), torch.arange(2))


def skipped_step(rank, size, folder):
    call = trained(step=rank > 0)
    raises((RuntimeError, ValueError), "changed on some ranks|must be the same", call)


def other_step(rank, size, folder):
    call = trained(lr=1.0 + (rank == 0))
    raises(ValueError, "small_arrays_of_the_weight must be the same on all ranks", call)


def unowned_target(rank, size, folder):
    _, many = pair()
    H, t = torch.randn(2, d).double(), torch.tensor([3, 23 if rank == 0 else 4])
    words = r"target must be in \[0, 23\)"
    if rank == 0:
        raises(ValueError, words, lambda: many(H, t))
    else:
        raises(RuntimeError, f"rank 0 of the process group refused.*{words}", lambda: many(H, t))


def other_prior(rank, size, folder):
    def make():
        prior = torch.ones(20) + torch.arange(20) * (rank == 0)
        FactoredSphericalLoss(d, 20, prior=prior, process_group=world())

    raises(ValueError, "prior must be the same on all ranks", make)


def one_linear_layer(rank, size, folder):
    raises(RuntimeError, "needs all rows", pair()[1].to_linear)


def pickled(rank, size, folder):
    import pickle

    raises(TypeError, "cannot be pickled", lambda: pickle.dumps(pair()[1].weight))


OTHERS = {**DIFFERENT, "trained": trained_on_one}


def differs(rank, size, folder, fact):
    refuses_another(fact, OTHERS[fact], pair()[1], rank)


REFUSED = (
    refused_by_every_layer(pair)
    | {f"other {fact}": partial(differs, fact=fact) for fact in OTHERS}
    | {
        case.__name__: case
        for case in (
            skipped_step,
            other_step,
            unowned_target,
            other_prior,
            one_linear_layer,
            pickled,
            state_of_one_rank,
            state_of_a_replaced_weight,
        )
    }
    | {
        f"{name} after an undone step": partial(error_after_an_undone_step, call=call, words=words)
        for name, (call, words) in AFTER_AN_UNDONE_STEP.items()
    }
)
