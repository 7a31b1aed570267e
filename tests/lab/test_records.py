"""The comparisons kept in records/: their tables are the code's, and the README quotes them."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from softsphere.lab import compare, summary
from softsphere.lab.records import Record

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "records").glob("*-compare*/metrics.jsonl"))
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def cells(text: str) -> list[str]:
    return [cell for row in csv.reader(io.StringIO(text)) for cell in row]


def number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


@every_folder
def test_the_tables_are_what_the_code_makes_of_the_runs(folder):
    record = Record(folder)
    rows = summary.summarise(compare.final_runs(record), compare.trial_runs(record))
    assert (folder / "table.md").read_text() == summary.to_markdown(rows)
    kept, made = cells((folder / "table.csv").read_text()), cells(summary.to_csv(rows))
    for one, other in zip(kept, made, strict=True):
        # the last digits are those of the libraries
        value = number(other)
        assert one == other if value is None else float(one) == pytest.approx(value, rel=1e-9)


@every_folder
def test_the_readme_quotes_every_error_of_the_records_that_it_names(folder):
    readme = (ROOT / "README.md").read_text()
    if folder.name not in readme:
        pytest.skip("the README does not name it")
    errors = re.findall(r"\| (\d+\.\d\d ± \d+\.\d\d) \|", (folder / "table.md").read_text())
    assert errors
    assert [error for error in errors if error not in readme] == []
