"""Tables in a terminal."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console

from softsphere_lab.report.grids import markdown, terminal_table


def printed(table: str, width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(terminal_table(table, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [50, 60, 80, 200])
def test_a_narrow_terminal_loses_no_letter_of_a_table(width):
    header = ("loss", "test error %", "test NLL", "seconds", "Δ error", "p")
    rows = [
        ("spherical_softmax:eps=0.123456", "2.56 ± 0.96", "0.1060 ± 0.0288", "1.5", "-1.00", "–"),
        ("softmax", "3.56 ± 1.97", "0.1195 ± 0.0643", "1.3", "–", "0.695"),
    ]
    table = markdown(header, rows)
    shown = printed(table, width)
    wanted = Counter("".join([*header, *(cell for row in rows for cell in row)]))
    found = Counter(shown.replace("─", ""))
    for each in (wanted, found):
        del each[" "], each["\n"]
    assert found == wanted
    assert max(map(len, shown.splitlines())) <= width


def test_a_wide_terminal_has_every_cell_whole():
    table = markdown(("loss", "p"), [("z_loss", "0.5"), ("softmax", "–")])
    lines = [line.split() for line in printed(table, 100).splitlines() if line.strip()]
    assert lines[0] == ["loss", "p"] and lines[2:] == [["z_loss", "0.5"], ["softmax", "–"]]
