"""Tables in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from softsphere_lab.report.grids import markdown, terminal_table


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_narrow_terminal_loses_no_letter_of_a_table(width):
    header = ("loss", "test error %", "test NLL", "seconds", "Δ error", "p")
    rows = [
        ("spherical_softmax:eps=0.123456", "2.56 ± 0.96", "0.1060 ± 0.0288", "1.5", "-1.00", "–"),
        ("softmax", "3.56 ± 1.97", "0.1195 ± 0.0643", "1.3", "–", "0.695"),
    ]
    out = io.StringIO()
    Console(file=out, width=width).print(terminal_table(markdown(header, rows)))
    shown = out.getvalue()
    assert "…" not in shown
    for text in (*header, *(cell for row in rows for cell in row)):
        for letter in set(text) - {" "}:
            assert shown.count(letter) >= text.count(letter)
    assert max(map(len, shown.splitlines())) <= width


def test_a_wide_terminal_has_every_cell_whole():
    table = markdown(("loss", "p"), [("z_loss", "0.5"), ("softmax", "–")])
    out = io.StringIO()
    Console(file=out, width=100).print(terminal_table(table))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["loss", "p"] and lines[2:] == [["z_loss", "0.5"], ["softmax", "–"]]
