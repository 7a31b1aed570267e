"""What output layers of language models begin with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softsphere_lab.models.output_layers import SMALLER, Output, layer

COUNTS = torch.arange(1, 31)


def linear(width: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, len(COUNTS))


@pytest.mark.parametrize(
    "name",
    [
        "softmax",
        "taylor_softmax prior",
        "spherical_softmax factored rate=0.1",
        "squared_error",
        "squared_error factored rate=0.1",
    ],
)
def test_layers_begin_with_the_same_weights_and_squared_error_with_smaller_ones(name):
    output, begun = Output.parse(name), linear(8)
    torch.manual_seed(0)
    head, own = layer(output, 8, COUNTS, "cpu")
    assert (own is not None) == output.factored
    smaller = SMALLER.get(output.loss, 1.0)
    assert (smaller < 1) == (output.loss == "squared_error")
    got = head.to_linear() if output.factored else head
    torch.testing.assert_close(got.weight, smaller * begun.weight)
    torch.testing.assert_close(got.bias, smaller * begun.bias)
