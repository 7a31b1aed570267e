"""Files that are whole or absent: each is written in one step, and a line cut off is left out."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

__all__ = ["UNFINISHED", "is_leftover", "whole_lines", "write", "write_bytes"]

# How the name of a file ends while it is being written.
UNFINISHED = ".unfinished"


def write(path: Path, text: str) -> None:
    """Writes a text file in one step; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one step: after an interrupt it is either the old one or the new one."""
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


def is_leftover(path: Path) -> bool:
    """Returns whether a file is what a killed process left of one that it was writing."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED) and path.is_file()


def whole_lines(text: bytes) -> bytes:
    """Returns JSON lines without the last one if it was cut off while it was written.

    >>> whole_lines(b'{"a": 1}' + bytes([10]) + b'{"a"')
    b'{"a": 1}\\n'
    """
    whole, _, last = text.rpartition(b"\n")
    if not last:
        return text
    try:
        json.loads(last)
    except ValueError:
        return whole + b"\n" if whole else b""
    return text + b"\n"
