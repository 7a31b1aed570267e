"""Accumulated gradients come into .grad as autograd delivers any others, with all hooks."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from _accumulation import TIGHT, D, batches, d, layer, run, same
from softsphere import LinearSphericalLoss


class Made(TorchDispatchMode):
    """Counts the tensors as large as W that are made meanwhile."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= D * d:
            self.count += not (func.is_view or func._schema.name.endswith("_"))
        return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_nothing_as_large_as_the_weight_is_made_but_its_gradient(before, transposed):
    head = layer()
    if transposed:
        head.weight = nn.Parameter(torch.randn(d, D).double().t())
    twin = copy.deepcopy(head)
    for x in (head, twin):
        if before:
            run(x, batches(1))
    with Made() as made, head.accumulate():
        run(head, batches())
    assert made.count == 1
    run(twin, batches())
    same(head, twin)


def test_hooks_see_the_sum_once():
    head, twin = layer(), layer()
    seen = []
    for name, x in head.named_parameters():
        x.register_hook(lambda g, name=name: seen.append((name, g.clone())) or 2 * g)
        x.register_post_accumulate_grad_hook(lambda x, name=name: seen.append((name, x.grad)))
    with head.accumulate():
        run(head, batches())
        assert not seen
    run(twin, batches())
    assert sorted(name for name, _ in seen) == ["bias", "bias", "weight", "weight"]
    for name, g in seen:
        x = getattr(head, name)
        by = 2 if g is x.grad else 1
        torch.testing.assert_close(g, by * getattr(twin, name).grad, **TIGHT)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_hook_that_is_newer_than_the_loss_is_refused(name):
    head, twin = layer(), layer()
    one, two, *_ = batches()
    with head.accumulate():
        loss, other = head(*one), head(*two)
        loss.backward()
        handle = head.get_parameter(name).register_hook(lambda g: pytest.fail("it has no gradient"))
        with pytest.raises(RuntimeError, match="was registered after a loss"):
            other.backward()
        handle.remove()
    twin(*one).backward()
    same(head, twin)


def test_an_optimizer_in_a_hook_steps_once():
    def stepping(head):
        optimizers = {x: torch.optim.SGD([x], lr=0.1) for x in head.parameters()}

        def step(x):
            optimizers[x].step()
            optimizers[x].zero_grad()

        for x in head.parameters():
            x.register_post_accumulate_grad_hook(step)

    head, twin = layer(), layer()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    stepping(head)
    with head.accumulate():
        run(head, batches())
    run(twin, batches())
    optimizer.step()
    for x, y in zip(head.parameters(), twin.parameters(), strict=True):
        assert x.grad is None
        torch.testing.assert_close(x, y, **TIGHT)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_backward_for_some_only(hooked):
    head, twin = layer(), layer()
    if hooked:
        head.bias.register_hook(lambda g: None)
    hidden, target = batches(1)[0]
    of = {"bias": ["bias"], "both": ["weight", "bias"]}

    def backward(x, names):
        x(hidden, target).backward(inputs=[hidden, *(getattr(x, name) for name in names)])

    with head.accumulate():
        head(hidden, target).backward()
        if hooked:
            with pytest.raises(RuntimeError, match="without inputs="):
                backward(head, of["bias"])
        with pytest.raises(RuntimeError, match=r"autograd\.grad"):
            torch.autograd.grad(head(hidden, target), [hidden, head.weight], allow_unused=True)
        if not hooked:
            for names in of.values():
                backward(head, names)
            torch.autograd.grad(head(hidden, target), hidden)
    twin(hidden, target).backward()
    if not hooked:
        for names in of.values():
            backward(twin, names)
    same(head, twin)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_layers_with_one_weight(order):
    embedding = nn.Embedding(D, d, dtype=torch.float64)
    twin = copy.deepcopy(embedding)

    def heads(x):
        return [LinearSphericalLoss.from_linear(x, name) for name in ("z_loss", "squared_error")]

    mine, theirs = heads(embedding), heads(twin)
    stacks = [ExitStack(), ExitStack()]
    for stack, head in zip(stacks, mine, strict=True):
        stack.enter_context(head.accumulate())
    for head in (*mine, *mine[::-1]):
        run(head, batches())
    for i in order:
        stacks[i].close()
    for head in (*theirs, *theirs):
        run(head, batches())
    torch.testing.assert_close(embedding.weight.grad, twin.weight.grad, **TIGHT)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_tied_embedding_and_a_gradient_of_its_own(sparse, before):
    grads = []
    words = torch.tensor([1, 2, 2, 5])
    for inside in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(D, d, dtype=torch.float64, sparse=sparse)
        head = LinearSphericalLoss.from_linear(embedding)
        if before:
            embedding(words).pow(2).sum().backward()
        with ExitStack() as stack:
            if inside:
                stack.enter_context(head.accumulate())
            for _ in range(2):
                head(embedding(words), words).backward()
            embedding.weight.pow(2).sum().backward()
        grads.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*grads, **TIGHT)
