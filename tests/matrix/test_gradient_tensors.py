"""StructuredGradient as PyTorch sees it."""

from __future__ import annotations

import pickle

import pytest
import torch

from _one_batch import backward, layer, rows, target, with_momentum
from softsphere.matrix import StructuredGradient


def test_a_gradient_of_another_weight_is_refused():
    one, two = layer(), layer()
    backward(one)
    two.weight.grad = one.weight.grad
    before = two.dense()
    with pytest.raises(RuntimeError, match="another weight"):
        torch.optim.SGD(two.parameters(), lr=0.1).step()
    backward(two)
    with pytest.raises(RuntimeError, match="another weight"):
        torch.add(one.weight.grad, two.weight.grad)
    assert torch.equal(two.dense(), before)


def test_a_multiple_of_the_momentum_is_not_one_of_the_weight():
    head = layer()
    buffer = with_momentum(head).state[head.weight]["momentum_buffer"]
    backward(head)
    for other in (buffer, buffer.clone(), 2 * buffer):
        with pytest.raises((TypeError, RuntimeError)), torch.no_grad():
            torch.add(head.weight.grad, other)


def test_a_gradient_is_not_pickled():
    head = layer()
    backward(head)
    assert isinstance(head.weight.grad, StructuredGradient)
    with pytest.raises(TypeError, match="means nothing without its weight"):
        pickle.dumps(head.weight.grad)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_anomaly_detection():
    with torch.autograd.detect_anomaly(check_nan=True):
        backward(layer())


def test_a_penalty_that_comes_first_is_refused_in_words():
    head = layer()
    before = head.dense()
    (head.weight.norm() ** 2).backward()
    loss = head(rows, target)
    with pytest.raises(RuntimeError, match="gradient of a penalty such as"):
        loss.backward()
    assert torch.equal(head.dense(), before)
