"""A run folder: what was asked, where it ran, and every metric, each file whole or not there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from softsphere_lab.errors import LabError

__all__ = ["Line", "Record", "environment", "write", "write_bytes"]

Line = dict[str, Any]

# How the name of a file ends while it is being written.
UNFINISHED = ".unfinished"


def widened(old: Any, new: Any) -> bool:
    """Whether a search of the new axes goes on with one of the old, as `Space.config` makes them.

    It does where each axis is the old one or goes on beyond its ends: all that was tried is still
    a point of the space, with the neighbours that it had.

    >>> old = {"x": {"values": [1, 2], "start": 1}}
    >>> widened(old, {"x": {"values": [1, 2, 3], "start": 1}})
    True
    >>> widened(old, {"x": {"values": [1, 1.5, 2], "start": 1}})
    False
    """

    def longer(before: Any, after: Any) -> bool:
        try:
            had, has = list(before["values"]), list(after["values"])
            runs = (has[i : i + len(had)] for i in range(len(has) - len(had) + 1))
            return before["start"] == after["start"] and had in runs
        except (TypeError, KeyError):
            return False

    if not isinstance(old, dict) or not isinstance(new, dict):
        return False
    return old.keys() == new.keys() and all(longer(old[name], new[name]) for name in old)


def write(path: Path, text: str) -> None:
    """Writes a text file in one step; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one step: after an interrupt it is the old one or the new one."""
    handle, name = tempfile.mkstemp(UNFINISHED, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def commit() -> str | None:
    """The commit of the source, with -dirty where it was changed since; None outside a checkout."""
    source = Path(__file__).parent
    try:
        for command in (
            ["ls-files", "--error-unmatch", Path(__file__).name],
            ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        ):
            told = subprocess.run(
                ["git", *command], cwd=source, capture_output=True, check=True, timeout=10
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.decode().strip()


def program() -> list[str]:
    """What was started: a script, or else the command."""
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and script.name != "__main__.py"
    return ["python", str(script)] if is_script else ["softsphere"]


def environment() -> Line:
    """The command, and the versions and hardware that its numbers came from."""
    packages = ("softsphere", "torch", "numpy", "scikit-learn", "datasets")
    return {
        "command": shlex.join([*program(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "commit": commit(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        # how glibc keeps large tensors' memory is a good part of the time of a wide softmax
        "malloc": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")},
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def differing(old: Line, new: Line, grows: tuple[str, ...]) -> list[str]:
    """The keys in which two configurations differ, but for those that may grow.

    A search may get longer axes, and a second look.
    """
    keys = dict.fromkeys([*old, *new])
    if widened(old.get("search"), new.get("search")):
        keys.pop("search", None)
    if new.get("second_look") or not old.get("second_look"):
        keys.pop("second_look", None)
    return [key for key in keys if key not in grows and old.get(key) != new.get(key)]


def deepest(path: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The first difference within two values, and where it is.

    >>> deepest("search", {"lr": {"start": 1}, "eps": {}}, {"lr": {"start": 2}, "eps": {}})
    ('search.lr.start', 1, 2)
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                return deepest(f"{path}.{key}", old.get(key), new.get(key))
    return path, old, new


def parsed(text: bytes, path: Path, number: int) -> Line:
    """The JSON object of a line. Raises LabError naming the file and the line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(line, dict):
        raise LabError(f"{path}, line {number}: not a JSON object")
    return line


def without_cut(text: bytes) -> bytes:
    """Text of whole lines: the last one goes if it was cut off while it was written."""
    whole, _, last = text.rpartition(b"\n")
    if not last:
        return text
    try:
        json.loads(last)
    except ValueError:
        return whole + b"\n" if whole else b""
    return text + b"\n"


def is_leftover(path: Path) -> bool:
    """Whether it is a file that was being written."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED) and path.is_file()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The lock of a folder. Raises: LabError where another process has it."""
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


class Record:
    """config.json, environment.jsonl (a line a start), and *.jsonl files of finished work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, config: Line) -> Record:
        """A new record.

        Raises: LabError where the folder holds something already, or another process works there.
        """
        # what a kill leaves of a file that was being written is nothing to keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            empty = all(is_leftover(path) for path in folder.iterdir())
        except OSError as error:
            raise LabError(
                f"--out {folder} cannot be a run folder ({error.strerror}); take another"
            ) from error
        if not empty:
            raise LabError(
                f"--out {folder} is not empty; pass --resume to do only what is missing there"
            )
        with locked(folder):
            return cls(folder).begun(config)

    @classmethod
    def reopen(cls, folder: Path, config: Line, grows: tuple[str, ...]) -> Record:
        """A record to go on with, made with this configuration but for what may grow.

        Raises: LabError where there is no record, or one of another configuration, or where another
        process works.
        """
        if not (folder / "config.json").exists():
            raise LabError(
                f"--resume: {folder} has no config.json; leave --resume out to begin there"
            )
        with locked(folder):
            old = cls(folder).config() or {}
            for key in grows:
                items = old.get(key)
                if not isinstance(items, list) or not all(isinstance(x, (str, int)) for x in items):
                    raise LabError(
                        f"{folder / 'config.json'} has no list of {key}; take another --out"
                    )
            for key in differing(old, config, grows):
                path, before, now = deepest(key, old.get(key), config.get(key))
                raise LabError(
                    f"--resume: {folder} was made with {path} = {before!r}, not {now!r}; give the "
                    "same, or another --out"
                )
            union = {key: list(dict.fromkeys([*old[key], *config[key]])) for key in grows}
            return cls(folder).begun({**config, **union})

    def begun(self, config: Line) -> Record:
        """The record, with what is asked of it and where it starts written down."""
        write(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.add("environment.jsonl", [environment()])
        return self

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it lasts, no other process works in the folder; what a kill left there goes.

        Raises: LabError where another one does.
        """
        with locked(self.folder):
            for path in self.folder.iterdir():
                if is_leftover(path):
                    path.unlink()
            yield

    def matches(self, config: Line, grows: tuple[str, ...]) -> bool:
        """Whether it was made with this configuration but for what may grow."""
        try:
            old = self.config()
        except (LabError, OSError):
            return False
        return old is not None and not differing(old, config, grows)

    def config(self) -> Line | None:
        """What was asked, None where no record is."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise LabError(f"{path} is not JSON ({error}); take another --out") from error
        if not isinstance(config, dict):
            raise LabError(f"{path} is not a JSON object; take another --out")
        return config

    def lines(
        self, name: str, flaw: Callable[[Line], str | None] = lambda line: None
    ) -> list[Line]:
        """The JSON lines of a file, none where it is not there.

        flaw: what a line lacks, None if nothing.
        Raises: LabError naming the file and the line that is not what it should be.
        """
        path = self.folder / name
        lines = []
        for number, text in enumerate(self.text(name).split(b"\n")[:-1], 1):
            line = parsed(text, path, number)
            wrong = flaw(line)
            if wrong is not None:
                raise LabError(f"{path}, line {number}: {wrong}")
            lines.append(line)
        return lines

    def add(self, name: str, lines: list[Line]) -> None:
        """Appends the lines, all of them or none."""
        new = "".join(json.dumps(line) + "\n" for line in lines)
        write_bytes(self.folder / name, self.text(name) + new.encode())

    def text(self, name: str) -> bytes:
        """The whole lines of a file, none where it is not there."""
        path = self.folder / name
        return without_cut(path.read_bytes()) if path.exists() else b""
