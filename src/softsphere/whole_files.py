"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

__all__ = ["UNFINISHED", "write_bytes"]

# How the name of a file ends while it is being written.
UNFINISHED = ".unfinished"


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one step: after an interrupt it is either the old one or the new one.

    As with `open`, a link stays a link to the file, an old file keeps its permissions, and a new
    one has those that the umask leaves.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no such folder to write into", str(path))
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # A full disk names no file, and the name of the unfinished one tells nobody anything.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
