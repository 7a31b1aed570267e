"""Each image comes back as a window of its reflected padding, perhaps mirrored."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from softsphere_lab.data.augment import flip_and_crop


def windows(image: Tensor, padding: int) -> dict[tuple[int, int, bool], Tensor]:
    """Every window of an image's reflected padding by its shift, as it is and mirrored."""
    _, height, width = image.shape
    padded = pad(image.unsqueeze(0), (padding,) * 4, mode="reflect").squeeze(0)
    found = {}
    for down, right in itertools.product(range(2 * padding + 1), repeat=2):
        window = padded[:, down : down + height, right : right + width]
        found[down, right, False] = window
        found[down, right, True] = window.flip(-1)
    return found


def numbered(count: int, channels: int, height: int, width: int) -> Tensor:
    """Images no two pixels of which are equal."""
    return torch.arange(float(count * channels * height * width)).view(
        count, channels, height, width
    )


def drawn(x: Tensor, padding: int, seed: int = 0) -> list[tuple[int, int, bool]]:
    """Which window of its image each result is; fails where it is none.

    Of an image at most 2 · padding + 1 wide two windows can be one another's mirror image: the
    first of these.
    """
    cropped = flip_and_crop(x, torch.Generator().manual_seed(seed), padding)
    assert cropped.shape == x.shape
    choices = []
    for image, result in zip(x, cropped, strict=True):
        found = windows(image, padding).items()
        matching = [key for key, window in found if torch.equal(window, result)]
        assert matching
        choices.append(matching[0])
    return choices


@pytest.mark.parametrize(
    ("shape", "padding"),
    [((20, 3, 10, 10), 4), ((20, 1, 8, 11), 4), ((20, 2, 9, 5), 4), ((20, 3, 6, 7), 0)],
)
def test_each_result_is_a_window_of_its_own_image(shape, padding):
    drawn(numbered(*shape), padding)


def test_all_shifts_and_both_mirrorings_occur_equally_often():
    padding, count = 2, 5000
    choices = Counter(drawn(numbered(count, 1, 4, 6), padding))
    assert set(choices) == set(itertools.product(range(5), range(5), (False, True)))
    # 50 windows of 100 images each, whose number has a deviation of 10
    assert all(abs(number - count / 50) < 50 for number in choices.values())


def test_the_generator_decides():
    x = torch.randn(32, 3, 8, 8)
    generator = torch.Generator().manual_seed(3)
    first, second = flip_and_crop(x, generator), flip_and_crop(x, generator)
    torch.manual_seed(7)  # the global state has no say
    again = flip_and_crop(x, torch.Generator().manual_seed(3))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(first, second)


def test_the_default_is_four_pixels():
    x = numbered(40, 1, 12, 12)
    default = flip_and_crop(x, torch.Generator().manual_seed(0))
    named = flip_and_crop(x, torch.Generator().manual_seed(0), padding=4)
    torch.testing.assert_close(default, named, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_type_of_the_numbers_and_their_values_stay(dtype, layout):
    x = torch.randint(256, (16, 3, 9, 9))
    wanted = flip_and_crop(x, torch.Generator().manual_seed(0))
    kept = x.clone()
    got = flip_and_crop(x.to(dtype, memory_format=layout), torch.Generator().manual_seed(0))
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted.to(dtype), rtol=0, atol=0)
    assert torch.equal(x, kept)


def test_no_images_give_none():
    x = torch.empty(0, 3, 8, 8)
    assert flip_and_crop(x, torch.Generator()).shape == x.shape


def test_what_comes_back_is_laid_out_for_convolutions():
    cropped = flip_and_crop(torch.randn(4, 3, 8, 8), torch.Generator())
    assert cropped.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", [-1, 5])
def test_images_too_small_for_the_padding_are_refused(padding):
    with pytest.raises(ValueError, match=f"less than the 8 × 5 pixels of an image, got {padding}"):
        flip_and_crop(torch.zeros(2, 1, 8, 5), torch.Generator(), padding)
