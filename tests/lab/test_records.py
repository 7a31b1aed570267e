"""The experiments kept in records/: their tables are the code's, and the README quotes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softsphere_lab.experiments.registry import EXPERIMENTS
from softsphere_lab.records.folder import Record

ROOT = Path(__file__).parents[2]
FOLDERS = [
    path.parent
    for path in sorted((ROOT / "records").glob("*/config.json"))
    if "experiment" in (Record(path.parent).config() or {})
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_are_what_the_code_makes_of_the_runs(folder):
    record = Record(folder)
    section = EXPERIMENTS[(record.config() or {})["experiment"]].section(record)
    if section is None:
        pytest.skip("no final run is finished")
    assert (folder / "table.md").read_text() == section.text
    for name in section.pictures:
        assert (folder / f"{name}.png").exists()


def test_the_readme_quotes_the_page_of_results():
    page, readme = (ROOT / "docs" / "results.md").read_text(), (ROOT / "README.md").read_text()
    quoted = re.findall(r"\d+\.\d+ ± \d+\.\d+|\d+\.\d+ to \d+\.\d+", readme)
    assert quoted
    assert [number for number in quoted if number not in page] == []


def test_the_rows_of_the_readme_are_rows_of_the_page():
    """The paper's number and p stand beside a result as they do there."""
    page = [cells(line) for line in (ROOT / "docs" / "results.md").read_text().splitlines()]
    rows = [row for row in map(cells, (ROOT / "README.md").read_text().splitlines())
            if any(" ± " in cell for cell in row)]  # fmt: skip
    assert rows
    for row in rows:
        told = {cell for cell in row if re.fullmatch(r"(< )?\d+\.\d+( ± \d+\.\d+)?", cell)}
        assert any(told <= set(other) for other in page), row


def cells(line: str) -> list[str]:
    """Of a row of a table; none of another line."""
    return [cell.strip() for cell in line.split("|")] if line.startswith("|") else []
