"""Files that are whole or absent: each is written in one step, and a line cut off is left out."""

from __future__ import annotations

import json
from pathlib import Path

from softsphere.whole_files import UNFINISHED, write_bytes

__all__ = ["is_leftover", "whole_lines", "write"]


def write(path: Path, text: str) -> None:
    """Writes a text file in one step; see `softsphere.whole_files`."""
    write_bytes(path, text.encode())


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
