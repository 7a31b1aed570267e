"""The pages are what the code makes of the records."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from _lab_results import DATA, STUDIES, text_end
from softsphere_lab.cli import app as cli
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.earlier import record_at
from softsphere_lab.experiments.page import SMOKE, best_records, report_of, results_page
from softsphere_lab.records.files import write
from softsphere_lab.records.folder import Record

ROOT = Path(__file__).parents[3]
FOLDERS = sorted(path.parent for path in (ROOT / "records").glob("*/config.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_page_of_a_record_is_what_the_code_makes_of_its_runs(folder):
    found = report_of(record_at(folder))
    assert found is not None
    assert (folder / "README.md").read_text() == found.markdown("#", folder)
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {path.name for path in found.pictures.values()}


def test_the_page_of_results_is_what_the_records_make():
    best = best_records(ROOT / "records")
    assert {each.record.folder for each in best} == set(FOLDERS)
    assert (ROOT / "docs" / "results.md").read_text() == results_page(best, ROOT / "docs")


def test_every_table_with_means_says_what_stands_after_their_sign():
    for folder in FOLDERS:
        page = (folder / "README.md").read_text()
        rows = [line for line in page.splitlines() if line.startswith("|") and " ± " in line]
        assert not rows or "after ± is half of a 95 % interval" in page


def page_of(records: Path) -> str:
    return results_page(best_records(records), records)


def test_a_record_in_part_says_how_much_of_it_there_is(tmp_path):
    experiment = STUDIES["ptb"]
    small = experiment.studies["small"]
    config = {"experiment": "ptb", "budget": "small", **small.config(), "data": DATA}
    record = Record.create(tmp_path / "2026-01-01-ptb-small", config)
    record.add("metrics.jsonl", [text_end("softmax", 0, 4.0)])
    runs = len(small.names) * len(small.seeds)
    lacking = f"0 of {runs} final runs are finished"
    # a final run counts when the search that chose it is there
    told = experiment.unfinished(record)
    assert told.startswith(lacking) and "missing: softmax (3), softmax, base measure (3)" in told
    page = page_of(tmp_path)
    assert f"**{told}**" in page and "## Penn Treebank" in page
    # more is better, and smoke is nothing to report
    full = Record.create(tmp_path / "2025-01-01-ptb", {**config, "budget": "full"})
    full.add("metrics.jsonl", [text_end("softmax", 0, 4.5)])
    smoke = Record.create(tmp_path / "2027-01-01-ptb-smoke", {**config, "budget": "smoke"})
    smoke.add("metrics.jsonl", [text_end("softmax", 0, 5.5)])
    assert [each.record.folder for each in best_records(tmp_path)] == [full.folder]
    # one without a final run has nothing to say
    Record.create(tmp_path / "2028-01-01-ptb", {**config, "budget": "full"})
    assert [each.record.folder for each in best_records(tmp_path)] == [full.folder]
    # of two alike the last
    last = Record.create(tmp_path / "2029-01-01-ptb", {**config, "budget": "full"})
    last.add("metrics.jsonl", [text_end("softmax", 0, 4.6)])
    assert [each.record.folder for each in best_records(tmp_path)] == [last.folder]


def test_a_record_without_its_configuration_is_not_left_out_in_silence(tmp_path):
    record = Record.create(tmp_path / "r", {"experiment": "ptb"})
    (record.folder / "config.json").unlink()
    (tmp_path / "notes").mkdir()  # a folder of another kind
    with pytest.raises(LabError, match=r"r has no config\.json.*restore the file"):
        best_records(tmp_path)


def test_a_smoke_test_says_that_its_numbers_mean_nothing(tmp_path):
    small = STUDIES["ptb"].studies["small"]
    config = {"experiment": "ptb", "budget": "smoke", **small.config(), "data": DATA}
    record = Record.create(tmp_path / "r", config)
    record.add("metrics.jsonl", [text_end("softmax", 0, 4.0)])
    page = report_of(record).markdown("#", record.folder)
    assert page.startswith(f"# Penn Treebank, smoke test\n\n*{SMOKE}*")
    assert "Claim" not in page and "Differences from the paper" not in page


def test_a_budget_that_is_none_is_named(tmp_path):
    small = STUDIES["ptb"].studies["small"]
    config = {"experiment": "ptb", "budget": "medium", **small.config(), "data": DATA}
    record = Record.create(tmp_path / "r", config)
    record.add("metrics.jsonl", [text_end("softmax", 0, 4.0)])
    with pytest.raises(LabError, match=r"r/config\.json: budget must be .*, got 'medium'"):
        best_records(tmp_path)


def test_report_writes_the_page_and_its_pictures(tmp_path, monkeypatch, capsys):
    def report(folder: Path, docs: Path) -> int:
        arguments = ["report", "--records", str(folder), "--docs", str(docs)]
        monkeypatch.setattr(sys, "argv", ["softsphere", *arguments])
        return cli.main()

    records, docs = tmp_path / "records", tmp_path / "docs"
    assert report(records, docs) == 2
    assert "no such folder" in capsys.readouterr().err
    records.mkdir()
    docs.mkdir()
    (docs / "results.md").write_text("mine")
    assert report(records, docs) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert (docs / "results.md").read_text() == "mine"
    study = replace(STUDIES["ptb"].studies["small"], seeds=(0,))
    config = {"experiment": "ptb", "budget": "small", **study.config(), "data": DATA}
    record = Record.create(records / "r", config)
    epoch = {"loss": "softmax", "setting": "softmax", "lr": 0.01, "seed": 0, "epoch": 1,
             "train_loss": 4.0, "valid_nll": 4.0, "valid_mrr": None, "seconds": 2.0}  # fmt: skip
    record.add("metrics.jsonl", [epoch, text_end("softmax", 0, 4.0)])
    # a folder of something else is left alone
    write(Record.create(records / "other", {"dataset": "digits"}).folder / "x", "")
    assert report(records, docs) == 0
    page, readme = (docs / "results.md").read_text(), (record.folder / "README.md").read_text()
    assert page == results_page(best_records(records), docs)
    assert "(../records/r/curves.png)" in page and "(curves.png)" in readme
    section = STUDIES["ptb"].section(record)
    assert section is not None and section.text in page and section.text in readme
    assert (record.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (records / "other" / "README.md").exists()
    # a picture stands once, in its record
    assert [path.name for path in docs.iterdir()] == ["results.md"]
    (tmp_path / "file").write_text("")
    assert report(records, tmp_path / "file") == 2
    assert "--docs" in capsys.readouterr().err
