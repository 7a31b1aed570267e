"""The command line's options: those of several commands, and checks that name the option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from softsphere_lab.errors import LabError

__all__ = [
    "DataDir",
    "Device",
    "Epochs",
    "Resume",
    "at_least_one",
    "folder",
    "positive",
    "usable",
]

# What torch counts the examples of a batch with.
MOST = 2**31 - 1


def at_least_one(option: str, value: int, most: int = MOST) -> int:
    return at_least(option, value, 1, most)


def positive(option: str, value: float | None) -> float | None:
    if value is not None and not 0 < value <= torch.finfo(torch.float32).max:
        raise LabError(f"{option} must be a positive number of float32, got {value}")
    return value


def folder(text: str) -> Path:
    """A path, which "" is not although Python reads it as the current folder."""
    if not text:
        raise typer.BadParameter("must not be empty")
    return Path(text)


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        parser=folder,
        metavar="FOLDER",
        help="Folder with NAME/train.parquet; default $SOFTSPHERE_DATA, or the hub.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Do only what is missing in --out, or the last run.")
]
Epochs = Annotated[int, typer.Option(help="Passes over the training part.")]


def usable(device: str) -> str:
    """A device that a number can be put on and read back from."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise LabError(f"--device {device} cannot be used: {reason}") from error
    return device


def at_least(option: str, value: int, least: int, most: int = MOST) -> int:
    if not least <= value <= most:
        raise LabError(f"{option} must be at least {least} and at most {most}, got {value}")
    return value
