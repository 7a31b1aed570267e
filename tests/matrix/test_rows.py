"""The rows of a factored weight after they were handed out."""

from __future__ import annotations

import torch

from _one_batch import layer, rows, target
from softsphere import SphericalLoss


def test_a_change_without_a_version_is_noticed():
    head = layer()
    state = head.state_dict()
    head(rows, target)  # Q is known
    state["weight"].data.mul_(1.5)
    linear = head.to_linear()
    want = SphericalLoss("taylor_softmax")(linear(rows), target)
    torch.testing.assert_close(head(rows, target), want)
