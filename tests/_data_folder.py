"""The folder of data sets on this machine, and small sets that tests write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from softsphere_lab.data.sources import VARIABLE

__all__ = ["FOLDER", "needs_data", "write_columns"]

FOLDER = os.environ.get(VARIABLE, "")
needs_data = pytest.mark.skipif(not FOLDER, reason=f"{VARIABLE} names no folder of data sets")


def write_columns(file: Path, **columns: object) -> None:
    """Writes a parquet file, whose folder is made: lists, or arrays of pyarrow, by their names."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)
