"""The columns of a part of a set in parquet files, which are read without a client of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softsphere_lab.errors import LabError

__all__ = ["Columns"]


class Columns:
    """The columns of a part by name, as lists; the client of the hub has parts of the same form."""

    def __init__(self, table: Any) -> None:
        self._table = table

    @classmethod
    def of(cls, files: Sequence[str]) -> Columns:
        """Reads parquet files of the same columns, whose rows follow each other.

        Raises LabError without pyarrow, and what pyarrow raises.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise LabError("parquet files are read with pyarrow; pip install pyarrow") from error
        return cls(pyarrow.concat_tables([parquet.ParquetFile(file).read() for file in files]))

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def column_names(self) -> list[str]:
        return list(self._table.column_names)

    def __getitem__(self, name: str) -> list[Any]:
        values: list[Any] = self._table[name].to_pylist()
        return values
