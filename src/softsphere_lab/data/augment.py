"""Random mirroring and shifting of a batch of images."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_moves", "flip_and_crop", "moved"]

PADDING = 4


def flip_and_crop(x: Tensor, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Mirrors each image with probability ½ and shifts it by up to `padding` pixels.

    x: (N, C, H, W), of any dtype. generator: the source of chance, on any device. padding: how many
    reflected pixels an image gets at each side before H × W pixels are cut out of it.
    Returns images with the shape, dtype and device of x, in the memory format channels_last.
    Raises ValueError if the images are too small to be reflected that far.
    """
    _check_padding(x, padding)
    return moved(x, draw_moves(len(x), generator, padding).to(x.device), padding)


def draw_moves(count: int, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Draws how `moved` moves that many images: (count, 3), on the device of the generator.

    The columns are the shift down and the shift to the right, each from 0 to 2 · padding, and
    whether the image is mirrored.
    """

    def chances(high: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator, device=generator.device)

    shifts = 2 * padding + 1
    return torch.cat([chances(shifts), chances(shifts), chances(2)], 1)


def moved(x: Tensor, moves: Tensor, padding: int = PADDING) -> Tensor:
    """Returns images x (N, C, H, W), moved as `draw_moves` has drawn it, in channels_last.

    Raises ValueError if the images are too small to be reflected that far.
    """
    _check_padding(x, padding)
    count, _, height, width = x.shape
    down, right, mirrored = moves.split(1, 1)

    def reflected(size: int, shift: Tensor) -> Tensor:
        """Returns where the pixels of each image come from along one axis, as (N, size)."""
        shifted = torch.arange(size, device=x.device) + shift - padding
        return size - 1 - (size - 1 - shifted.abs()).abs()

    rows, columns = reflected(height, down), reflected(width, right)
    columns = torch.where(mirrored == 1, columns.flip(1), columns)
    image = torch.arange(count, device=x.device)
    picked = x[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1)


def _check_padding(x: Tensor, padding: int) -> None:
    height, width = x.shape[-2:]
    if not 0 <= padding < min(height, width):
        raise ValueError(
            f"padding must be at least 0 and less than the {height} × {width} pixels of an image, "
            f"got {padding}"
        )
