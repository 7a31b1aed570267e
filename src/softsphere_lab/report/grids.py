"""Tables in Markdown, and how a terminal shows them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

__all__ = ["markdown", "terminal_table"]

# What stands between two columns, and at the edges.
GAP, EDGES = 2, 2
# A column of names is at least as wide where the widths are chosen here.
LEAST_NAME = 8


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def terminal_table(table: str, width: int) -> Table:
    """Returns a table in Markdown as one for a terminal of that width.

    The first column has names, the others have numbers. Where a terminal is narrow, cells continue
    on the next line and lose nothing: numbers are broken between words, and names where they must.
    """
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    header, rows = lines[0], lines[2:]
    columns = list(zip(header, *rows, strict=True))
    shown = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for place, (title, size) in enumerate(zip(header, _column_widths(columns, width), strict=True)):
        shown.add_column(title, justify="right" if place else "left", overflow="fold", width=size)
    for row in rows:
        shown.add_row(*row)
    return shown


def _column_widths(columns: Sequence[Sequence[str]], width: int) -> list[int | None]:
    """Returns the width of each column, None where the library is to choose it.

    >>> _column_widths([["name", "z_loss"], ["error", "1 ± 2"]], 80)
    [6, 5]
    >>> _column_widths([["name", "spherical_softmax"], ["error", "1.25 ± 2"]], 23)
    [14, 5]
    """
    whole = [max(map(len, column)) for column in columns]
    edges = EDGES + GAP * (len(columns) - 1)
    if sum(whole) + edges <= width:
        return [*whole]
    words = [max(len(word) for cell in column for word in cell.split()) for column in columns[1:]]
    names = width - edges - sum(words)
    return [min(names, whole[0]), *words] if names >= LEAST_NAME else [None] * len(columns)
