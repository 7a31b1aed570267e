"""Tables in Markdown, and how a terminal shows them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

__all__ = ["markdown", "terminal_table"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def terminal_table(table: str) -> Table:
    """Returns a table in Markdown as one for a terminal.

    The first column has names, the others have numbers. Where a terminal is narrow, cells continue
    on a second line and lose nothing.
    """
    header, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    shown = Table(box=box.SIMPLE)
    for place, title in enumerate(header):
        shown.add_column(title, justify="right" if place else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown
