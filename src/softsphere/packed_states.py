"""States as `torch.save` writes them, of which a damaged one is told from a good one."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import torch

__all__ = ["DamagedError", "packed", "unpacked"]


class DamagedError(ValueError):
    """A state does not have the numbers that were written."""


def packed(state: Any) -> bytes:
    """What torch.save writes, with the checksums that it may have been told to leave out."""
    content, wanted = io.BytesIO(), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(state, content)
    finally:
        torch.serialization.set_crc32_options(wanted)
    return content.getvalue()


def unpacked(content: bytes) -> Any:
    """Returns the state on the CPU. No code in it is run.

    Raises DamagedError if numbers do not fit their checksum, at which torch.load does not look, and
    what torch.load raises for content that torch.save did not write.
    """
    if zipfile.ZipFile(io.BytesIO(content)).testzip() is not None:
        raise DamagedError("its numbers do not fit their checksum")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
