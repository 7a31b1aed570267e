"""Options that several commands have, and checks that name the option."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from softsphere_lab.errors import LabError

__all__ = [
    "MOST_EPOCHS",
    "MOST_SEEDS",
    "DataDir",
    "Device",
    "Epochs",
    "Jobs",
    "Resume",
    "Seeds",
    "at_least_one",
    "folder",
    "html_file",
    "out_option",
    "positive",
    "share_cores",
    "usable",
]

# torch counts the examples of a batch with 32 bits.
MOST = 2**31 - 1
# Far more than anybody runs.
MOST_SEEDS, MOST_EPOCHS = 10_000, 100_000


def folder(text: str) -> Path:
    """Reads a path. Python takes an empty one for the current folder, which nobody means."""
    if not text:
        raise typer.BadParameter("must not be empty")
    return Path(text)


Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        parser=folder,
        metavar="FOLDER",
        help="Folder with NAME/train.parquet and the other parts; default $SOFTSPHERE_DATA, "
        "or the hub.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Do only what is missing in --out, or in the last run with these options."
    ),
]
Jobs = Annotated[int, typer.Option(help="Number of processes, each with its share of the cores.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training part.")]
Seeds = Annotated[int, typer.Option(help="Number of seeds: 0, 1, …")]


def out_option(default: str) -> Any:
    """The option --out, with the folder that stands for it in the help."""
    return typer.Option(parser=folder, metavar="FOLDER", help=f"Run folder; default {default}.")


def at_least_one(option: str, value: int, most: int = MOST) -> int:
    """Returns a number that is at least one. Raises LabError if it is not, or too large."""
    if not 1 <= value <= most:
        raise LabError(f"{option} must be at least 1 and at most {most}, got {value}")
    return value


def positive(option: str, value: float | None) -> float | None:
    """Returns a number if it is positive in float32, and None for None."""
    if value is not None and not 0 < value <= torch.finfo(torch.float32).max:
        raise LabError(f"{option} must be a positive number of float32, got {value}")
    return value


def html_file(option: str, path: Path, out: Path | None) -> Path:
    """Returns the path of a page that can be written once the run folder `out` is made.

    Raises LabError if it cannot, so that nobody trains for hours and loses the page.
    """
    if path.is_dir():
        raise LabError(f"{option} {path} is a folder; name a file, such as {path / 'page.html'}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise LabError(f"{option} {path}: the name of a page ends in .html")
    made = out is not None and path.parent.resolve() == out.resolve()
    if not made and not path.parent.is_dir():
        raise LabError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise LabError(f"{option} {path}: the folder {path.parent} cannot be written to")
    return path


def usable(device: str) -> str:
    """Returns a device if a number can be put on it and read back."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise LabError(f"--device {device} cannot be used: {reason}") from error
    return device


def share_cores(jobs: int, nproc: int = 1) -> None:
    """Gives each process its share of the threads, as the record will say."""
    at_least_one("--jobs", jobs, max(1, os.cpu_count() or 1))
    torch.set_num_threads(max(1, torch.get_num_threads() // (jobs * nproc)))
