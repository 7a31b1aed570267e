"""Data sets of images as tensors: scikit-learn's digits, and public sets by name or folder."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softsphere_lab.data.sources import (
    VARIABLE,
    chosen,
    client,
    digest,
    instead,
    local,
    public,
    reading,
)
from softsphere_lab.errors import LabError

__all__ = ["DATASETS", "VARIABLE", "Images", "Split", "load"]

VALIDATION_SHARE = 0.1
# With fewer images the validation part would be empty.
FEWEST_IMAGES = 10
# The least difference between two pixels of 8 bits.
GREY_STEP = 1 / 255
PARTS = ("train", "test")


@dataclass(frozen=True)
class Split:
    """Images (N, channels, height, width) in float32 and labels (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: str) -> Split:
        return Split(self.x.to(device), self.y.to(device))

    def take(self, index: Tensor) -> Split:
        return Split(self.x[index], self.y[index])


@dataclass(frozen=True)
class Images:
    """A data set whose validation part was held out of its training part.

    sha256: of the pixels and labels as they were read. The rounding of the standardisation differs
    between machines and has no part in it.
    """

    train: Split
    valid: Split
    test: Split
    num_classes: int
    sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.x.shape[1:])

    def to(self, device: str) -> Images:
        train, valid, test = self.train.to(device), self.valid.to(device), self.test.to(device)
        return Images(train, valid, test, self.num_classes, self.sha256)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what distinguishes this data from other data of the same name, for a record."""
        return {
            "train": len(self.train) + len(self.valid),
            "test": len(self.test),
            "shape": list(self.shape),
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class Hub:
    """The name of a public set on the hub, its columns, and its number of classes."""

    name: str
    image: str
    label: str
    num_classes: int


HUBS = {
    "mnist": Hub("ylecun/mnist", "image", "label", 10),
    "cifar10": Hub("uoft-cs/cifar10", "img", "label", 10),
    "cifar100": Hub("uoft-cs/cifar100", "img", "fine_label", 100),
}


def digits() -> tuple[Split, Split, int]:
    """Returns scikit-learn's 1,797 digits of 8 × 8, a fifth of them to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    images = torch.from_numpy(x.reshape(-1, 1, 8, 8) / 16).float()
    labels = torch.from_numpy(y).long()
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10


def _from_hub(name: str, data_dir: Path | None) -> tuple[Split, Split, int]:
    """Reads the public copy of a set, or one with the same columns from a local folder."""
    hub = HUBS[name]
    parts: Any
    if data_dir is None:
        datasets = client()
        with public(hub.name, name, PARTS):
            parts = datasets.load_dataset(hub.name)
    else:
        parts = local(data_dir, name, PARTS, instead(hub.name))
    source = hub.name if data_dir is None else f"--data-dir {data_dir}: {name}"
    train, test = (as_split(parts[part], hub, f"{source}/{part}") for part in PARTS)
    if train.x.shape[1:] != test.x.shape[1:]:
        sizes = [tuple(part.x.shape[1:]) for part in (train, test)]
        raise LabError(f"{source}: images must be of one size, got {sizes[0]} and {sizes[1]}")
    return train, test, hub.num_classes


def as_split(part: Any, hub: Hub, source: str) -> Split:
    """Returns a part of a set as tensors, pixels in [0, 1].

    part: its columns by name, of the hub or of a folder. source: its name in errors.
    """
    columns = part.column_names
    image = hub.image if hub.image in columns else "image"
    label = hub.label if hub.label in columns else "label"
    if image not in columns or label not in columns:
        raise LabError(
            f"{source} must have columns {hub.image} and {hub.label}, got {', '.join(columns)}"
        )
    labels = _checked_labels(part[label][:], hub, source, label)
    with reading(f"{source}: cannot read the images in column {image}"):
        pictures = [_picture(value) for value in part[image][:]]
    return Split(_pixels(pictures, source), labels)


def _checked_labels(values: list[Any], hub: Hub, source: str, column: str) -> Tensor:
    """Returns the labels. Raises LabError if there are too few or one is not a class."""
    if len(values) < FEWEST_IMAGES:
        raise LabError(f"{source} must have at least {FEWEST_IMAGES} images, got {len(values)}")
    for row, value in enumerate(values):
        if type(value) is not int or not 0 <= value < hub.num_classes:
            raise LabError(
                f"{source}: {column} must be an integer from 0 to {hub.num_classes - 1}, "
                f"got {value!r:.40} in row {row}"
            )
    return torch.tensor(values)


def _picture(value: Any) -> Any:
    """Returns an image of PIL from the bytes of its file, alone or in a dict beside a path.

    A set of the hub has images of PIL already, and None is no image.
    """
    from PIL import Image, ImageOps

    if value is None or isinstance(value, Image.Image):
        return value
    content = value["bytes"] if isinstance(value, dict) else value
    picture = Image.open(io.BytesIO(content) if content is not None else value["path"])
    picture.load()
    # as the client of the hub does it: a photograph may say which side is up
    return ImageOps.exif_transpose(picture)


def _pixels(pictures: list[Any], source: str) -> Tensor:
    """Returns images (N, channels, height, width) in [0, 1], if they have one size and 8 bits."""
    for row, picture in enumerate(pictures):
        if picture is None:
            raise LabError(f"{source}: there is no image in row {row}")
        if picture.mode not in ("L", "RGB"):
            raise LabError(
                f"{source}: images must be grey or RGB with 8 bits, got {picture.mode} in row {row}"
            )
    rows = [np.asarray(picture) for picture in pictures]
    shapes = list(dict.fromkeys(row.shape for row in rows))
    if len(shapes) > 1:
        raise LabError(f"{source}: images must be of one size, got {shapes[0]} and {shapes[1]}")
    stacked = torch.from_numpy(np.stack(rows))
    stacked = stacked.unsqueeze(1) if stacked.dim() == 3 else stacked.movedim(-1, 1)
    return stacked.float() / 255


DATASETS: dict[str, Callable[[Path | None], tuple[Split, Split, int]]] = {
    "digits": lambda _: digits(),
    **{name: lambda folder, name=name: _from_hub(name, folder) for name in HUBS},  # type: ignore[misc]
}


def load(name: str, data_dir: Path | None = None) -> Images:
    """Returns the set of that name, standardised per channel.

    A tenth of the training part is held out for validation, the same in every run.

    data_dir: a folder with NAME/train.parquet and NAME/test.parquet with the columns of the public
    copy; by default the environment variable SOFTSPHERE_DATA, and without it the public hub.
    Raises LabError for an unknown set and for one that cannot be read, and says what would help.
    """
    if name not in DATASETS:
        raise LabError(f"--dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits" and data_dir is not None:
        raise LabError("digits come with scikit-learn; leave --data-dir out")
    train, test, num_classes = DATASETS[name](chosen(data_dir))
    sha256 = digest(train.x, train.y, test.x, test.y)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held = round(len(train) * VALIDATION_SHARE)
    valid, train = train.take(order[:held]), train.take(order[held:])
    mean = train.x.mean((0, 2, 3), keepdim=True)
    # the standard deviation of a channel that is the same in every image is zero
    std = train.x.std((0, 2, 3), keepdim=True).clamp_min(GREY_STEP)

    def standardised(part: Split) -> Split:
        return Split((part.x - mean) / std, part.y)

    return Images(standardised(train), standardised(valid), standardised(test), num_classes, sha256)
