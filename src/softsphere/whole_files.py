"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["UNFINISHED", "write_bytes"]

# How the name of a file ends while it is being written.
UNFINISHED = ".unfinished"


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
