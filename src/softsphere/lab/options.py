"""Checks of the command line's options, each an error of one line that names the option."""

from __future__ import annotations

from pathlib import Path

import torch
import typer

from softsphere.lab.errors import LabError

__all__ = ["at_least_one", "folder", "positive", "usable"]

# What torch counts the examples of a batch with.
MOST = 2**31 - 1


def at_least_one(option: str, value: int, most: int = MOST) -> int:
    if not 1 <= value <= most:
        raise LabError(f"{option} must be at least 1 and at most {most}, got {value}")
    return value


def positive(option: str, value: float | None) -> float | None:
    if value is not None and not 0 < value <= torch.finfo(torch.float32).max:
        raise LabError(f"{option} must be a positive number of float32, got {value}")
    return value


def folder(text: str) -> Path:
    """A path, which "" is not although Python reads it as the current folder."""
    if not text:
        raise typer.BadParameter("must not be empty")
    return Path(text)


def usable(device: str) -> str:
    """A device that a number can be put on and read back from."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise LabError(f"--device {device} cannot be used: {reason}") from error
    return device
