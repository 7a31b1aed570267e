"""The folder of data sets on this machine, for tests that read them."""

from __future__ import annotations

import os

import pytest

from softsphere_lab.data.sources import VARIABLE

__all__ = ["FOLDER", "needs_data"]

FOLDER = os.environ.get(VARIABLE, "")
needs_data = pytest.mark.skipif(not FOLDER, reason=f"{VARIABLE} names no folder of data sets")
