"""FactoredTensor in moves, copies, checkpoints and other processes."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref

import pytest
import torch
from torch import nn

from _one_batch import backward, d, layer, rows, target, with_momentum
from softsphere.matrix import FactoredTensor

MOVES = {
    "device": lambda head: head.to(head.weight.device),
    "float": nn.Module.float,
    "double": nn.Module.double,
}


@pytest.mark.parametrize("move", MOVES)
def test_a_move_keeps_hooks_attributes_and_views(move):
    head, seen = layer(), []
    head.weight.register_hook(lambda g: g * 0.25)
    head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    head.weight.mark = 7
    reference, row, parameter = weakref.ref(head.weight), head.weight[3], head.weight
    MOVES[move](head)
    assert head.weight is parameter is reference()
    assert head.weight.mark == 7
    backward(head)
    assert len(seen) == 1
    want = copy.deepcopy(head)
    (0.25 * want(rows.to(want.weight.dtype), target)).backward()
    torch.testing.assert_close(head.weight.grad.norm(), want.weight.grad.norm())
    assert row.clone().shape == (d + 1,)


def test_meta_layers_have_a_state():
    assert layer().to("meta").state_dict()["weight"].is_meta


def test_pickle_with_bias_and_momentum():
    head = layer()
    with_momentum(head)
    other = pickle.loads(pickle.dumps(head))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.dense(), head.dense())
    assert torch.empty_like(head.weight).shape == head.weight.shape


def test_inference_mode_binds_nothing():
    head, other = layer(), layer()
    optimizers = [with_momentum(each) for each in (head, other)]
    state = copy.deepcopy(head.state_dict())
    with torch.inference_mode():
        head.load_state_dict(state)
        head.log_prob(rows)
    other.load_state_dict(state)
    for each, optimizer in zip((head, other), optimizers, strict=True):
        backward(each)
        optimizer.step()
    torch.testing.assert_close(head.dense(), other.dense(), rtol=1e-12, atol=1e-12)


def test_a_weight_without_its_optimizer_lets_go_of_the_momentum():
    head = layer()
    optimizer = with_momentum(head)
    assert head.matrix.arrays.blocks == 2
    del optimizer
    gc.collect()
    with_momentum(head, 1, momentum=0.0)
    assert head.matrix.arrays.blocks == 1


def shifted(head, queue):
    """In another process: changes what came, and sends back what it is."""
    with torch.no_grad():
        head.weight.add_(1.0)
    queue.put(head.dense().sum().item())


@pytest.mark.once("the other process would need a GPU of its own")
def test_another_process_gets_a_copy():
    head = layer()
    before = head.dense()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=shifted, args=(head, queue))
    process.start()
    total = queue.get(timeout=60)
    process.join(timeout=60)
    assert total == pytest.approx(float(before.sum()) + before.numel())
    assert torch.equal(head.dense(), before)
    backward(head)
    torch.optim.SGD(head.parameters(), lr=0.1).step()


def test_shallow_copies_are_the_same_weight():
    head = layer()
    other = copy.copy(head.weight)
    with torch.no_grad():
        other.mul_(2)
    assert torch.equal(head.weight, other)
    assert isinstance(other, FactoredTensor)


def test_a_whole_model_is_saved_with_less_than_two_copies():
    head = layer()
    buffer = io.BytesIO()
    torch.save(head, buffer)
    assert buffer.tell() < 2 * head.weight.numel() * 8 + 20_000
