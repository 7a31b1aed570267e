"""The networks take the images that they say they take, and every weight of theirs learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softsphere_lab.errors import LabError
from softsphere_lab.models import image_networks as models

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 13)]


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_parameter_has_a_gradient(name, shape):
    torch.manual_seed(0)
    model = models.build(name, shape, 7)
    logits = model(torch.randn(16, *shape))
    assert logits.shape == (16, 7)
    nn.functional.cross_entropy(logits, torch.arange(16) % 7).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), key


@pytest.mark.parametrize("name", models.MODELS)
def test_the_last_layer_is_linear(name):
    """So that each output is any number: nothing after it bounds the outputs."""
    last = list(models.build(name, (1, 8, 8), 7).modules())[-1]
    assert isinstance(last, nn.Linear) and last.bias is not None


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_and_channels_last_change_nothing_but_the_rounding(name, shape):
    torch.manual_seed(0)
    model = models.build(name, shape, 7).eval()
    x = torch.randn(16, *shape)
    with torch.no_grad():
        wanted = model(x)
        model = model.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x.contiguous(memory_format=torch.channels_last))
    assert got.dtype == torch.bfloat16
    # each of at most eight layers rounds twice to 8 bits
    error = (got.float() - wanted).abs().max() / wanted.abs().max()
    assert error < 16 * 2**-8


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_suited_takes_these_images(name, shape):
    models.suited(name, shape, 7)


@pytest.mark.parametrize(("name", "side"), [("cnn", 3), ("lenet", 3), ("resnet", 7)])
def test_suited_refuses_smaller_images_in_one_line(name, side):
    with pytest.raises(LabError) as raised:
        models.suited(name, (3, side, side), 7)
    message = str(raised.value)
    assert message.startswith(f"--model {name} cannot take images of 3 × {side} × {side} (")
    assert message.endswith("take another --model") and "\n" not in message


def test_a_residual_block_adds_to_what_it_is_given():
    block = models.Residual(4)
    nn.init.zeros_(block.f[0].weight)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)
