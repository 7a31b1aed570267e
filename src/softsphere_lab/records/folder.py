"""A run folder: what was asked for, where it ran, and every metric."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softsphere.whole_files import write_bytes
from softsphere_lab.errors import LabError
from softsphere_lab.records.differences import deepest_difference, differing_keys
from softsphere_lab.records.environment import environment
from softsphere_lab.records.files import is_leftover, whole_lines, write

__all__ = ["Line", "Record"]

# An object of JSON.
Line = dict[str, Any]
# The file with a line for each start.
ENVIRONMENT = "environment.jsonl"
# What to do about a spoiled line. A run counts as finished as long as the line of its end is there.
_REMOVE = (
    "restore the file, or remove the line and all others of its run; --resume then does what is "
    "missing"
)


class Record:
    """config.json, environment.jsonl with a line for each start, and *.jsonl of finished work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, config: Line, nproc: int = 1, device: str = "cpu") -> Record:
        """Returns a new record.

        nproc: how many processes train each run together. device: where they compute.

        Raises LabError if the folder is not empty, or another process works there.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            empty = all(is_leftover(path) for path in folder.iterdir())
        except OSError as error:
            raise LabError(
                f"--out {folder} cannot be a run folder ({error.strerror}); take another"
            ) from error
        if not empty and not (folder / "config.json").exists():
            raise LabError(
                f"--out {folder} is not empty and no run folder, since it has no config.json; take "
                "another"
            )
        if not empty:
            raise LabError(
                f"--out {folder} is not empty; pass --resume to do only what is missing there"
            )
        with _locked(folder):
            return cls(folder).begun(config, nproc, device)

    @classmethod
    def reopen(
        cls,
        folder: Path,
        config: Line,
        grows: tuple[str, ...],
        nproc: int = 1,
        device: str = "cpu",
    ) -> Record:
        """Returns a record that is resumed.

        grows: the lists of its configuration that may grow. nproc: how many processes train each
        run together, which may be another number than before. device: where they compute.

        Raises LabError if there is no record, if it was made with another configuration, or if
        another process works there.
        """
        if not (folder / "config.json").exists():
            filled = folder.is_dir() and not all(is_leftover(path) for path in folder.iterdir())
            mend = "take another --out" if filled else "leave --resume out to begin there"
            raise LabError(f"--resume: {folder} has no config.json; {mend}")
        with _locked(folder):
            old = cls(folder).config() or {}
            for key in grows:
                items = old.get(key)
                if not isinstance(items, list) or not all(isinstance(x, (str, int)) for x in items):
                    raise LabError(
                        f"{folder / 'config.json'} has no list of {key}; take another --out"
                    )
            cls(folder).check_made_with(config, grows)
            cls(folder).lines(ENVIRONMENT, _flaw_of_start)
            union = {key: list(dict.fromkeys([*old[key], *config[key]])) for key in grows}
            return cls(folder).begun({**config, **union}, nproc, device)

    def begun(self, config: Line, nproc: int = 1, device: str = "cpu") -> Record:
        """Writes down what is asked for and where it starts, and returns the record."""
        write(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.add(ENVIRONMENT, [environment(nproc, device)])
        return self

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes out of the folder, and removes what a killed one left there.

        Raises LabError if another process works there.
        """
        with _locked(self.folder):
            for path in self.folder.iterdir():
                if is_leftover(path):
                    path.unlink()
            yield

    def check_made_with(self, config: Line, grows: tuple[str, ...] = ()) -> None:
        """Raises LabError for a record that was made with another configuration.

        grows: the lists of it that may grow. A folder without a record passes.
        """
        old = self.config() or config
        for key in differing_keys(old, config, grows):
            path, before, now = deepest_difference(key, old.get(key), config.get(key))
            raise LabError(
                f"--resume: {self.folder} was made with {path} = {before!r}, not {now!r}; give the "
                "same, or another --out"
            )

    def matches(self, config: Line, grows: tuple[str, ...]) -> bool:
        """Returns whether it was made with this configuration, apart from what may grow."""
        try:
            old = self.config()
        except (LabError, OSError):
            return False
        return old is not None and not differing_keys(old, config, grows)

    def config(self) -> Line | None:
        """Returns what was asked for, or None if there is no record."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise LabError(
                f"{path} is not JSON ({error}); restore the file, or remove the folder"
            ) from error
        if not isinstance(config, dict):
            raise LabError(f"{path} is not a JSON object; restore the file, or remove the folder")
        return config

    def environments(self) -> list[Line]:
        """Returns where each start of the record ran, at least one.

        Raises LabError if the record does not say it.
        """
        found = self.lines(ENVIRONMENT, _flaw_of_start)
        if not found:
            raise LabError(
                f"{self.folder / ENVIRONMENT} is missing or empty, so that nobody knows where the "
                "numbers come from; restore the file, or remove the folder"
            )
        return found

    def lines(
        self, name: str, flaw: Callable[[Line], str | None] = lambda line: None
    ) -> list[Line]:
        """Returns the JSON lines of a file, none if there is no such file.

        flaw: returns what is wrong with a line, or None. Raises LabError with the file and the
        number of the first line that is wrong.
        """
        path = self.folder / name
        lines = []
        for number, text in enumerate(self.text(name).split(b"\n")[:-1], 1):
            line = _parse_line(text, path, number)
            wrong = flaw(line)
            if wrong is not None:
                raise LabError(f"{path}, line {number}: {wrong}; {_REMOVE}")
            lines.append(line)
        return lines

    def add(self, name: str, lines: list[Line]) -> None:
        """Appends lines to a file, all of them or none."""
        new = "".join(json.dumps(line) + "\n" for line in lines)
        write_bytes(self.folder / name, self.text(name) + new.encode())

    def text(self, name: str) -> bytes:
        """Returns the whole lines of a file, none if there is no such file."""
        path = self.folder / name
        return whole_lines(path.read_bytes()) if path.exists() else b""


def _flaw_of_start(line: Line) -> str | None:
    """Returns what a line of environment.jsonl lacks of what the pages tell, or None."""
    lacking = [key for key in ("command", "machine", "cuda", "packages") if key not in line]
    if lacking:
        return f"has no {lacking[0]}"
    packages = line["packages"]
    known = isinstance(packages, dict) and "torch" in packages
    return None if known else "has no version of torch in packages"


def _parse_line(text: bytes, path: Path, number: int) -> Line:
    """Returns the JSON object of a line. Raises LabError with the file and the line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabError(f"{path}, line {number}: not JSON; {_REMOVE}") from error
    if not isinstance(line, dict):
        raise LabError(f"{path}, line {number}: not a JSON object; {_REMOVE}")
    return line


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder. Raises LabError if another process holds it."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise LabError(
            f"another softsphere works in {folder}; wait for it, or take another --out"
        ) from error
    try:
        yield
    finally:
        os.close(handle)
