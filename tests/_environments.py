"""New environments with chosen packages of this one, made without a network in a second or two."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(requirements: Iterable[str], extras: frozenset[str] = frozenset()) -> Iterator[str]:
    """The names of what is asked for, without what only an extra asks for."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
        ):
            yield canonicalize_name(requirement.name)


def closure(names: Iterable[str]) -> dict[str, Distribution]:
    """The installed distributions with these names, and all that they need.

    Raises PackageNotFoundError for one that is not installed here.
    """
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = distribution(name)
            waiting += needed(found[name].requires or [])
    return found


def python_with(folder: Path, names: Iterable[str]) -> Path:
    """The interpreter of a new environment that has these packages of this one, and no others."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    for each in closure(names).values():
        for top in {path.parts[0] for path in each.files or [] if path.parts[0] != ".."}:
            place = site / top
            if not place.exists() and top != "__pycache__":
                place.symlink_to(Path(str(each.locate_file(top))).resolve())
    return python


def lacking(names: Iterable[str]) -> str | None:
    """What would have to be installed here, or None."""
    try:
        closure(names)
    except PackageNotFoundError as error:
        return str(error.name)
    return None
