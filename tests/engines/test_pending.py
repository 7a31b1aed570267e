"""A gradient that is still to be computed is refused to everything that reads it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from _accumulation import D, batches, d, layer, run, same

PENDING = r"pending inside accumulate\(\).*after the context"
OPTIMIZERS = {
    "sgd": lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.9, foreach=False),
    "sgd, foreach": lambda x: torch.optim.SGD(x, lr=0.1, foreach=True),
    "sgd, fused": lambda x: torch.optim.SGD(x, lr=0.1, fused=True),
    "adamw": lambda x: torch.optim.AdamW(x, foreach=False),
    "adamw, foreach": lambda x: torch.optim.AdamW(x, foreach=True),
    "adamw, fused": lambda x: torch.optim.AdamW(x, fused=True),
    "adagrad": lambda x: torch.optim.Adagrad(x),
    "rmsprop": lambda x: torch.optim.RMSprop(x),
}


def over_a_trunk():
    """A trunk with gradients and a head, and all their values."""
    torch.manual_seed(0)
    trunk, head = nn.Linear(d, d, dtype=torch.float64), layer()
    trunk(torch.randn(2, d).double()).sum().backward()
    return trunk, head, [x.detach().clone() for x in (*trunk.parameters(), *head.parameters())]


@pytest.mark.parametrize("first", ["trunk", "head", "in groups"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_inside_is_refused_before_anything_has_moved(name, first):
    trunk, head, values = over_a_trunk()
    of = [[*trunk.parameters()], [*head.parameters()]]
    groups = [{"params": x} for x in of]
    optimizer = OPTIMIZERS[name](
        {"trunk": of[0] + of[1], "head": of[1] + of[0], "in groups": groups}[first]
    )
    state = str(optimizer.state_dict())
    with head.accumulate():
        run(head, batches())
        with pytest.raises(RuntimeError, match=PENDING):
            optimizer.step()
        assert str(optimizer.state_dict()) == state
    for x, was in zip(of[0] + of[1], values, strict=True):
        assert torch.equal(x, was)
    optimizer.step()
    for x, was in zip(of[0] + of[1], values, strict=True):
        assert not torch.equal(x, was)


READERS = {
    "clip_grad_norm_": lambda x: nn.utils.clip_grad_norm_(x, 1.0),
    "clip_grad_norm_, foreach": lambda x: nn.utils.clip_grad_norm_(x, 1.0, foreach=True),
    "clip_grad_value_": lambda x: nn.utils.clip_grad_value_(x, 1.0),
    "norm": lambda x: x[0].grad.norm(),
    "copy": lambda x: torch.zeros_like(x[0]).copy_(x[0].grad),
    "add": lambda x: x[0].grad + 1,
    "mul_": lambda x: x[0].grad.mul_(2),
    "add_ of a row": lambda x: x[0].grad.add_(torch.ones(d, dtype=torch.float64)),
    "index": lambda x: x[0].grad[0],
    "dtype": lambda x: x[0].grad.float(),
    "by hand": lambda x: x[0].data.add_(x[0].grad, alpha=-0.1),
    "foreach by hand": lambda x: torch._foreach_add_([x[0].data], [x[0].grad]),
    "pickle": lambda x: pickle.dumps(x[0].grad),
}


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_pending_gradient_raises(name):
    head = layer()
    values = [x.detach().clone() for x in head.parameters()]
    with head.accumulate():
        run(head, batches())
        with pytest.raises(RuntimeError, match=PENDING):
            READERS[name]([*head.parameters()])
    for x, was in zip(head.parameters(), values, strict=True):
        assert torch.equal(x, was)
    twin = layer()
    run(twin, batches())
    same(head, twin)


def test_a_scaler_inside_is_refused():
    trunk, head, _ = over_a_trunk()
    optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    grads = [x.grad.clone() for x in trunk.parameters()]
    with head.accumulate():
        scaler.scale(head(*batches(1)[0])).backward()
        for work in (scaler.unscale_, scaler.step):
            with pytest.raises(RuntimeError, match=PENDING):
                work(optimizer)
    for x, was in zip(trunk.parameters(), grads, strict=True):
        assert torch.equal(x.grad, was)


def test_to_look_at_a_pending_gradient_is_harmless():
    head, twin = layer(), layer()
    with head.accumulate():
        run(head, batches())
        grad = head.weight.grad
        assert "pending" in repr(grad) and "pending" in str(grad)
        assert grad.shape == (D, d) and grad.dtype == torch.float64 and grad.is_leaf
        assert "pending" in repr(grad.detach()) and "pending" in repr(grad.data)
        copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    assert all(x.weight.grad is None for x in copies)
    run(twin, batches())
    same(head, twin)
    with pytest.raises(RuntimeError, match="pending"):
        grad.add_(torch.ones_like(head.weight))  # too late


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("zero", ["none", "zeros", "foreach zeros", "module", "module zeros"])
def test_zero_grad_inside_forgets_as_it_does_outside(zero, before, again):
    def work(head):
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, foreach=zero == "foreach zeros")
        run(head, batches(2))
        if "module" in zero:
            head.zero_grad(set_to_none="zeros" not in zero)
        else:
            optimizer.zero_grad(set_to_none="zeros" not in zero)
        if again:
            run(head, batches(3))

    head, twin = layer(), layer()
    for x in (head, twin):
        if before:
            run(x, batches(1))
    with head.accumulate():
        work(head)
    work(twin)
    same(head, twin)
    assert before or again or (head.weight.grad is None) == ("zeros" not in zero)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_gradient_is_forgotten_and_the_other_kept(name, again):
    head, twin, seen = layer(), layer(), []

    def work(head):
        run(head, batches(2))
        getattr(head, name).grad = None
        if again:
            run(head, batches(3))

    getattr(head, name).register_post_accumulate_grad_hook(seen.append)
    with head.accumulate():
        work(head)
    work(twin)
    same(head, twin)
    assert len(seen) == again


@pytest.mark.parametrize("raises", [False, True])
def test_a_gradient_that_was_there_is_the_one_that_is_there_after(raises):
    head, twin = layer(), layer()
    for x in (head, twin):
        run(x, batches(1))
    grads, was = [x.grad for x in head.parameters()], [x.grad.clone() for x in head.parameters()]

    def work():
        with head.accumulate():
            run(head, batches())
            if raises:
                raise KeyError

    if raises:
        with pytest.raises(KeyError):
            work()
    else:
        work()
        run(twin, batches())
    assert all(x.grad is g for x, g in zip(head.parameters(), grads, strict=True))
    same(head, twin)
    assert all(torch.equal(g, x) == raises for g, x in zip(grads, was, strict=True))


def test_a_gradient_that_is_put_there_inside_is_added_to():
    head, twin = layer(), layer()

    def work(head):
        run(head, batches(2))
        head.weight.grad = torch.ones_like(head.weight)
        head.weight.grad.add_(head.weight.detach())
        run(head, batches(3))
        head.weight.grad.add_(head.weight.detach())

    with head.accumulate():
        work(head)
    work(twin)
    same(head, twin)


def test_no_optimizer_is_watched_after_it():
    from torch.optim import optimizer

    head = layer()
    before = len(optimizer._global_optimizer_pre_hooks)
    with pytest.raises(KeyError), head.accumulate():
        raise KeyError
    assert len(optimizer._global_optimizer_pre_hooks) == before
