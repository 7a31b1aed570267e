"""Random mirroring and shifting of a batch of images."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["flip_and_crop"]


def flip_and_crop(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Mirrors each image with probability ½ and shifts it by up to `padding` pixels.

    x: (N, C, H, W), of any dtype. generator: the source of chance, on any device. padding: how many
    reflected pixels an image gets at each side before H × W pixels are cut out of it.
    Returns images with the shape, dtype and device of x, in the memory format channels_last.
    Raises ValueError if the images are too small to be reflected that far.
    """
    count, _, height, width = x.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(
            f"padding must be at least 0 and less than the {height} × {width} pixels of an image, "
            f"got {padding}"
        )

    def chances(high: int) -> Tensor:
        drawn = torch.randint(high, (count, 1), generator=generator, device=generator.device)
        return drawn.to(x.device)

    def reflected(size: int) -> Tensor:
        """Returns where the pixels of each image come from along one axis, as (N, size)."""
        shifted = torch.arange(size, device=x.device) + chances(2 * padding + 1) - padding
        return size - 1 - (size - 1 - shifted.abs()).abs()

    rows, columns = reflected(height), reflected(width)
    columns = torch.where(chances(2) == 1, columns.flip(1), columns)
    image = torch.arange(count, device=x.device)
    picked = x[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1)
