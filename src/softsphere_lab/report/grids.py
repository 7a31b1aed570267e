"""Tables of words, for a file and for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

__all__ = ["markdown", "terminal"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def terminal(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """The table for a terminal; the first column is of names, the others of numbers."""
    table = Table(title=title, box=box.SIMPLE)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
