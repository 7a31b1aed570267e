"""Small networks for images; the last layer computes the outputs o, whatever the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from softsphere_lab.errors import LabError

__all__ = ["MODELS", "build", "known", "suited"]


def _mlp(shape: tuple[int, ...], num_classes: int, width: int = 256) -> nn.Sequential:
    """Two hidden ReLU layers with dropout."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, num_classes),
    )


def _cnn(shape: tuple[int, ...], num_classes: int, width: int = 32) -> nn.Sequential:
    """Two blocks of two 3 × 3 convolutions with batch normalisation, and one hidden layer."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    channels, height, across = shape
    return nn.Sequential(
        *block(channels, width),
        *block(width, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        *block(2 * width, 2 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (across // 4), 256),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(256, num_classes),
    )


def _lenet(shape: tuple[int, ...], num_classes: int, width: int = 16) -> nn.Sequential:
    """Two 5 × 5 convolutions, each with pooling, and one hidden layer with dropout."""
    channels, height, across = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (across // 4), 8 * width),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(8 * width, num_classes),
    )


class Residual(nn.Module):
    """x + f(x), where f is a 3 × 3 convolution with batch normalisation and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.f(x))


def _resnet(shape: tuple[int, ...], num_classes: int, width: int = 64) -> nn.Sequential:
    """A 4 × 4 convolution that halves the image, two blocks that halve it again, and a maximum.

    Each block has a 3 × 3 convolution that doubles the channels, and a residual one.
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            Residual(outputs),
        ]

    return nn.Sequential(
        nn.Conv2d(shape[0], width, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *block(width, 2 * width),
        *block(2 * width, 4 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Sequential]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "lenet": _lenet,
    "resnet": _resnet,
    "narrow_resnet": partial(_resnet, width=32),
}


def known(name: str) -> str:
    """Returns the name of a network. Raises LabError if there is no such network."""
    if name not in MODELS:
        raise LabError(f"--model must be one of {', '.join(MODELS)}, got {name!r}")
    return name


def build(name: str, shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Returns the network of that name for images of shape (channels, height, width)."""
    return MODELS[name](shape, num_classes)


def suited(name: str, shape: tuple[int, ...], num_classes: int) -> None:
    """Raises LabError if images of that shape cannot pass through the network."""
    with torch.device("meta"), torch.no_grad(), warnings.catch_warnings():
        # PyTorch warns of layers without weights before the forward pass fails
        warnings.simplefilter("ignore")
        try:
            build(name, shape, num_classes).eval()(torch.empty(1, *shape))
        except RuntimeError as error:
            size = " × ".join(map(str, shape))
            raise LabError(
                f"--model {name} cannot take images of {size} ({str(error).splitlines()[0]}); "
                "take another --model"
            ) from error
