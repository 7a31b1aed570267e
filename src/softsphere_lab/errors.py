"""What went wrong for a reason the user can mend: the command line prints it in one line."""

from __future__ import annotations

__all__ = ["LabError"]


class LabError(Exception):
    """Names what came and what would do; never a bug of ours."""
