"""Where public sets are read from (a local folder or the hub), and what tells two sets apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from softsphere_lab.data.columns import Columns
from softsphere_lab.errors import LabError

__all__ = ["VARIABLE", "chosen", "client", "digest", "instead", "local", "public", "reading"]

VARIABLE = "SOFTSPHERE_DATA"


def chosen(folder: Path | None) -> Path | None:
    """Returns the folder of --data-dir, by default that of the environment; None means the hub."""
    default = os.environ.get(VARIABLE)
    return folder or (Path(default) if default else None)


def client() -> Any:
    """Returns the module `datasets`, which the hub alone needs. Raises LabError without it."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise LabError(
            "sets of the hub are read with datasets; pip install datasets, or name a folder by "
            "--data-dir"
        ) from error
    return datasets


def _parquet_files(folder: Path, name: str, parts: Sequence[str]) -> dict[str, list[str]] | None:
    """The files of each part, from anywhere in folder/name or from the folder itself."""
    for root, pattern in ((folder / name, "**/{}*.parquet"), (folder, "{}*.parquet")):
        files = {part: sorted(map(str, root.glob(pattern.format(part)))) for part in parts}
        if all(files.values()):
            return files
    return None


def local(folder: Path, name: str, parts: Sequence[str], otherwise: str = "") -> dict[str, Columns]:
    """Returns the parts of a set in a folder, by name.

    otherwise: what an error says would help if the folder lacks the set.
    """
    if not folder.is_dir():
        raise LabError(f"--data-dir {folder}: there is no such folder")
    files = _parquet_files(folder, name, parts)
    if files is None:
        raise LabError(
            f"--data-dir {folder} has no {_listed(name, '{}*.parquet', parts)}{otherwise}"
        )
    with reading(f"--data-dir {folder}: cannot read {name}"):
        found = {part: Columns.of(files[part]) for part in parts}
    empty = [part for part in parts if not len(found[part])]
    if empty:
        raise LabError(f"--data-dir {folder}: {name}/{empty[0]} must have rows, got none")
    return found


def instead(hub: str) -> str:
    """Returns the end of an error: that the hub has the set too."""
    return f"; leave it (and the environment variable {VARIABLE}) out to load {hub} from the hub"


@contextmanager
def public(hub: str, name: str, parts: Sequence[str]) -> Iterator[None]:
    """Adds to an error of the hub which local copy would help."""
    copy = _listed(name, "{}.parquet", parts)
    with reading(
        f"cannot load {hub} from the hub",
        f"; give a local copy with --data-dir FOLDER that holds {copy}",
    ):
        yield


@contextmanager
def reading(failed: str, otherwise: str = "") -> Iterator[None]:
    """Turns any error of a reader, which raises dozens of kinds, into a LabError of one line."""
    try:
        yield
    except LabError:
        raise  # which says what would help already
    except Exception as error:
        cause = f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise LabError(f"{failed} {cause}{otherwise}") from error


def _listed(name: str, file: str, parts: Sequence[str]) -> str:
    """The files of a set, in words."""
    *others, last = (f"{name}/{file.format(part)}" for part in parts)
    return f"{', '.join(others)} and {last}"


def digest(*contents: Tensor | bytes) -> str:
    """Returns the first twelve digits of the SHA-256 of bytes and of the values of tensors."""
    sha = hashlib.sha256()
    for content in contents:
        sha.update(content if isinstance(content, bytes) else content.contiguous().numpy().data)
    return sha.hexdigest()[:12]
