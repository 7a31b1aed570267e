"""Pages that are made from tables say what the tables say."""

from __future__ import annotations

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_costs_is_that_of_the_measured_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    costs = importlib.import_module("costs_page")
    assert costs.PAGE.read_text() == costs.page()


def test_the_page_of_engines_is_that_of_the_measured_grid(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    engines = importlib.import_module("engines_page")
    assert engines.PAGE.read_text() == engines.page(engines.read_table(engines.TABLE))
