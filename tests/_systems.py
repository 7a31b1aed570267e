"""What a test needs of the operating system."""

from __future__ import annotations

import os

import pytest

__all__ = ["posix"]

posix = pytest.mark.skipif(os.name != "posix", reason="needs the signals and files of POSIX")
