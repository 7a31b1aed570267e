"""Records of commands that are no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from softsphere_lab.errors import LabError
from softsphere_lab.experiments.earlier import record_at
from softsphere_lab.experiments.registry import REPRODUCTIONS, experiment_of
from softsphere_lab.records.files import write
from softsphere_lab.records.folder import Record

RECORDS = Path(__file__).parents[3] / "records"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("2026-11-ptb-engines", "engines"),
        ("2026-11-ptb-twins", "twins"),
        ("2026-11-ptb-twins-float64", "twins-float64"),
    ],
)
def test_a_record_of_a_command_that_is_no_more_is_one_of_the_experiment_in_its_place(folder, name):
    record = record_at(RECORDS / folder)
    experiment = experiment_of(record)
    assert experiment is REPRODUCTIONS[name]
    assert experiment.unfinished(record) == ""
    # what it was made with is what the experiment asks for at its full budget
    asked, config = REPRODUCTIONS[name].studies["full"].config(), record.config() or {}
    assert {key: config[key] for key in asked} == asked


def test_a_spoiled_line_of_such_a_record_is_named(tmp_path):
    for name in ("config.json", "environment.jsonl"):
        write(tmp_path / name, (RECORDS / "2026-11-ptb-twins" / name).read_text())
    write(tmp_path / "metrics.jsonl", '{"engine": "dense", "epoch": 1}\n')
    record = record_at(tmp_path)
    with pytest.raises(LabError, match=r"metrics\.jsonl, line 1: has no train_loss"):
        REPRODUCTIONS["twins"].section(record)


@pytest.mark.parametrize("config", ["{}", '{"dataset": "digits", "losses": ["softmax"]}'])
def test_a_record_of_nothing_known_is_of_no_experiment(config, tmp_path):
    write(tmp_path / "config.json", config)
    assert experiment_of(record_at(tmp_path)) is None
    assert type(record_at(tmp_path)) is Record
