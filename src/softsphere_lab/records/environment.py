"""The command, the versions and the hardware that the numbers of a record come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import softsphere

__all__ = ["EAGER", "environment", "gpu_name", "is_eager"]

# If this environment variable is 1, a GPU takes the operations of a training step one by one, so
# that a debugger sees them.
EAGER = "SOFTSPHERE_EAGER"


def is_eager() -> bool:
    """Returns whether training steps are not to be captured as CUDA graphs."""
    return os.environ.get(EAGER, "0") == "1"


def environment(nproc: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Returns what is recorded at each start of a command, as JSON.

    nproc: how many processes train each run together. device: where they compute.
    """
    others = ("torch", "triton", "numpy", "scikit-learn", "datasets")
    versions = {name: _version(name) for name in others}
    return {
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "commit": _commit(),
        "packages": {"softsphere": softsphere.__version__, **versions},
        "machine": platform.machine(),
        "system": platform.system(),
        "nproc": nproc,
        "threads": torch.get_num_threads(),
        # how glibc keeps the memory of large tensors is much of the time of a wide softmax
        "malloc": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")},
        "eager": is_eager(),
        "cuda": gpu_name(device),
        "cuda_toolkit": torch.version.cuda if device.startswith("cuda") else None,
        "cuda_driver": _driver() if device.startswith("cuda") else None,
    }


def gpu_name(device: str) -> str | None:
    """Returns the name of a GPU, or None for another device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else None


def _version(package: str) -> str | None:
    """Returns the version of a package, or None where it is not installed and so not used."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Returns the version of the driver of the GPUs, or None where its tool is missing."""
    try:
        answer = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.splitlines()[0] if answer else None


def _program() -> list[str]:
    """Returns the program that was started: a script or the command."""
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and script.name != "__main__.py"
    return ["python", str(script)] if is_script else ["softsphere"]


# All of a checkout but its records, which experiments write and numbers do not come from.
SOURCE = (":/", ":(top,exclude)records")


def _commit() -> str | None:
    """Returns the commit of the source, or None outside a checkout.

    It ends in -dirty if the source was changed since.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *SOURCE)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    """Returns what git says in the folder of this file."""
    return _said_by("git", *arguments, cwd=Path(__file__).parent)


def _said_by(*command: str, cwd: Path | None = None) -> str:
    """Returns what a program prints. Raises OSError or SubprocessError if it fails."""
    answer = subprocess.run(command, cwd=cwd, capture_output=True, check=True, timeout=10)
    return answer.stdout.decode().strip()
