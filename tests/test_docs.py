"""Pages that are made from tables say what the tables say."""

from __future__ import annotations

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_engines_is_that_of_the_measured_grid(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    linear = importlib.import_module("linear")
    grid = linear.values("grid")
    m, D, d = (sorted({int(key[i]) for key in grid}) for i in range(3))
    assert linear.PAGE.read_text() == linear.markdown(grid, m, D, d)
