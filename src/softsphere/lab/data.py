"""Data sets of images as tensors: scikit-learn's digits, or public sets by name or folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softsphere.lab.errors import LabError

__all__ = ["DATASETS", "Images", "Split", "load"]

VALIDATION_SHARE = 0.1
VARIABLE = "SOFTSPHERE_DATA"


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
    """A data set whose validation part was held out of its training part."""

    train: Split
    valid: Split
    test: Split
    num_classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.x.shape[1:])

    def to(self, device: str) -> Images:
        train, valid, test = self.train.to(device), self.valid.to(device), self.test.to(device)
        return Images(train, valid, test, self.num_classes)


@dataclass(frozen=True)
class Hub:
    """Where a public set lives and what its columns are called."""

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
    """scikit-learn's 1,797 digits of 8 × 8: four fifths to train on, one to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    images = torch.from_numpy(x.reshape(-1, 1, 8, 8) / 16).float()
    labels = torch.from_numpy(y).long()
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10


def parquet_files(folder: Path, name: str) -> dict[str, list[str]] | None:
    """The files of each part: anywhere in folder/name, or right in the folder itself."""
    for pattern in (f"{name}/**/{{}}*.parquet", "{}*.parquet"):
        files = {
            part: sorted(map(str, folder.glob(pattern.format(part)))) for part in ("train", "test")
        }
        if all(files.values()):
            return files
    return None


def from_hub(name: str, data_dir: Path | None) -> tuple[Split, Split, int]:
    """The public copy of a set, or the same schema from a local folder."""
    import datasets

    hub = HUBS[name]
    files = None if data_dir is None else parquet_files(data_dir, name)
    if data_dir is not None and files is None:
        raise LabError(
            f"--data-dir {data_dir} has no {name}/train*.parquet and {name}/test*.parquet; leave "
            f"it (and the environment variable {VARIABLE}) out to load {hub.name} from the hub"
        )
    try:
        if files is None:
            parts = datasets.load_dataset(hub.name)
        else:
            datasets.disable_progress_bars()
            parts = datasets.load_dataset("parquet", data_files=files)
    except Exception as error:  # the client raises dozens of kinds
        cause = f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if files is not None:
            raise LabError(f"--data-dir {data_dir}: cannot read {name} {cause}") from error
        raise LabError(
            f"cannot load {hub.name} from the hub {cause}; give a local copy with --data-dir "
            f"FOLDER that holds {name}/train.parquet and {name}/test.parquet"
        ) from error
    return split(parts["train"], hub), split(parts["test"], hub), hub.num_classes


def split(part: Any, hub: Hub) -> Split:
    """A part of a set as tensors, pixels in [0, 1]."""
    import datasets

    columns = part.column_names
    image = hub.image if hub.image in columns else "image"
    label = hub.label if hub.label in columns else "label"
    if image not in columns or label not in columns:
        raise LabError(
            f"{hub.name} must have columns {hub.image} and {hub.label}, got {', '.join(columns)}"
        )
    part = part.select_columns([image, label]).cast_column(image, datasets.Image())
    pixels = torch.from_numpy(np.stack([np.asarray(row) for row in part[image][:]]))
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.movedim(-1, 1)
    return Split(pixels.float() / 255, torch.tensor(part[label][:]))


DATASETS: dict[str, Callable[[Path | None], tuple[Split, Split, int]]] = {
    "digits": lambda _: digits(),
    **{name: lambda folder, name=name: from_hub(name, folder) for name in HUBS},  # type: ignore[misc]
}


def load(name: str, data_dir: Path | None = None) -> Images:
    """The set of that name, standardised per channel, a tenth of its training part held out.

    The tenth is the same in every run and for every seed.

    data_dir: a folder with NAME/train.parquet and NAME/test.parquet in the schema of the public
    copy; by default the environment variable SOFTSPHERE_DATA, and without it the public hub.
    Raises: LabError for an unknown set, and for one that cannot be had, saying what would do.
    """
    if name not in DATASETS:
        raise LabError(f"--dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if data_dir is None and os.environ.get(VARIABLE):
        data_dir = Path(os.environ[VARIABLE])
    train, test, num_classes = DATASETS[name](data_dir)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held = round(len(train) * VALIDATION_SHARE)
    valid, train = train.take(order[:held]), train.take(order[held:])
    mean = train.x.mean((0, 2, 3), keepdim=True)
    std = train.x.std((0, 2, 3), keepdim=True)

    def standardised(part: Split) -> Split:
        return Split((part.x - mean) / std, part.y)

    return Images(standardised(train), standardised(valid), standardised(test), num_classes)
