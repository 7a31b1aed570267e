"""The error of a mistake that the user can mend. The command line prints it in one line."""

from __future__ import annotations

__all__ = ["LabError"]


class LabError(Exception):
    """Says what was given and what would work. It is never raised for a bug of the lab."""
