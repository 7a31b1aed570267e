"""Run folders that were cut off or spoiled: what is gone on with, and what is said of the rest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from softsphere.whole_files import UNFINISHED
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.on_images.classification import Classification
from softsphere_lab.records.folder import Record
from softsphere_lab.study import ledger
from softsphere_lab.study.protocol import RUNS

START = {"loss": "softmax", "setting": "softmax", "lr": 0.001, "seed": 0}
EPOCH = {"epoch": 1, "train_loss": 0.5, "valid_error": 0.1, "valid_nll": 0.4, "seconds": 1.0}
FINAL = {
    "best_epoch": 1,
    "valid_error": 0.1,
    "mean_valid_error": 0.1,
    "test_error": 0.1,
    "test_nll": None,
    "seconds": 1.0,
    "diverged": False,
}
GOOD = [{**START, **EPOCH}, {**START, "final": FINAL}]


def text(lines: list) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize(
    "cut", ['{"loss": "soft', '{"loss": "softmax", "x": "\u00e4'[:-1] + "\udcc3"]
)
def test_a_line_that_was_cut_off_is_not_there_and_the_next_takes_its_place(tmp_path, cut):
    path = tmp_path / RUNS
    path.write_bytes((text(GOOD) + cut).encode(errors="surrogateescape"))
    record = Record(tmp_path)
    assert ledger.final_runs(Classification, record) == GOOD
    record.add(RUNS, GOOD[:1])
    assert path.read_text() == text([*GOOD, GOOD[0]])


def test_a_last_line_that_only_lacks_its_end_is_there(tmp_path):
    path = tmp_path / RUNS
    path.write_text(text(GOOD).rstrip("\n"))
    Record(tmp_path).add(RUNS, GOOD[:1])
    assert path.read_text() == text([*GOOD, GOOD[0]])


SPOILED = {
    "half a line": (b'{"loss": "soft\n', "line 1: not JSON"),
    "no UTF-8": (b'{"loss": "\xff"}\n', "line 1: not JSON"),
    "an empty line": (b"\n", "line 1: not JSON"),
    "a list": (b"[1]\n", "line 1: not a JSON object"),
    "no keys": (b"{}\n", "line 1: has no loss"),
    "a later line": (text([*GOOD, START]).encode(), "line 3: has no epoch"),
    "another type": (text([{**GOOD[0], "seed": "0"}]).encode(), "line 1: has seed = '0'"),
    "a bool": (text([{**GOOD[0], "epoch": True}]).encode(), "line 1: has epoch = True"),
    "no object": (text([{**START, "final": 1}]).encode(), "line 1: must be an object, got 1"),
    "no test": (
        text([{**START, "final": {**FINAL, "test_error": None}}]).encode(),
        "line 1: has no test_error",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_file_is_named_with_its_line(tmp_path, case):
    content, words = SPOILED[case]
    (tmp_path / RUNS).write_bytes(content)
    with pytest.raises(LabError, match=words) as caught:
        ledger.final_runs(Classification, Record(tmp_path))
    assert str(tmp_path / RUNS) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"losses": 1}', b'{"losses": [[]]}'])
def test_a_spoiled_configuration_is_named_and_is_nobodys_match(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    record, config = Record(tmp_path), {"losses": ["softmax"], "epochs": 2}
    assert not record.matches(config, ("losses",))
    with pytest.raises(LabError, match=r"config\.json"):
        Record.reopen(tmp_path, config, ("losses",))
    assert (tmp_path / "config.json").read_bytes() == content


STARTS = {
    "cut": (b"{\n", "not JSON"),
    "hollow": (b"{}\n", "line 1: has no command"),
    "no version": (b'{"command": "", "machine": "", "cuda": null, "packages": {}}\n', "of torch"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_spoiled_file_of_starts_is_refused_before_anything_is_trained(tmp_path, case):
    content, words = STARTS[case]
    config = {"losses": ["softmax"]}
    record = Record.create(tmp_path / "r", config)
    (record.folder / "environment.jsonl").write_bytes(content)
    for read in (record.environments, lambda: Record.reopen(record.folder, config, ("losses",))):
        with pytest.raises(LabError, match=words) as caught:
            read()
        assert str(record.folder / "environment.jsonl") in str(caught.value)
    assert (record.folder / "environment.jsonl").read_bytes() == content


def test_a_record_that_was_killed_before_its_first_start_is_gone_on_with(tmp_path):
    config = {"losses": ["softmax"]}
    record = Record.create(tmp_path / "r", config)
    (record.folder / "environment.jsonl").unlink()
    with pytest.raises(LabError, match=r"environment\.jsonl is missing or empty"):
        record.environments()
    assert len(Record.reopen(record.folder, config, ("losses",)).environments()) == 1


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    record = Record.create(tmp_path / "a run", {"losses": []})
    script = (
        "import sys; from pathlib import Path; from softsphere_lab.records.folder import Record\n"
        "with Record(Path(sys.argv[1])).alone(): print('alone')"
    )

    def another() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", script, str(record.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with record.alone():
        assert "another softsphere works in" in another().stderr
    assert another().stdout == "alone\n"


def test_who_is_refused_has_changed_nothing(tmp_path):
    record = Record.create(tmp_path / "r", {"losses": ["softmax"]})
    before = {path.name: path.read_bytes() for path in record.folder.iterdir()}
    with record.alone(), pytest.raises(LabError, match="another softsphere works in"):
        Record.reopen(record.folder, {"losses": ["z_loss"]}, ("losses",))
    assert {path.name: path.read_bytes() for path in record.folder.iterdir()} == before


def test_what_a_kill_left_of_a_file_is_in_nobodys_way(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / f".config.json.x7d{UNFINISHED}").write_text("{")
    record = Record.create(folder, {"losses": []})
    (folder / ".gitignore").write_text("*.png")
    with record.alone():
        found = {path.name for path in folder.iterdir()}
    assert found == {"config.json", "environment.jsonl", ".gitignore"}


@pytest.mark.parametrize("name", ["a file", ".gitignore"])
def test_a_folder_that_holds_anything_is_not_begun_in(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(LabError, match=r"not empty and no run folder.*take another"):
        Record.create(tmp_path, {"losses": []})
    with pytest.raises(LabError, match=r"has no config\.json; take another --out"):
        Record.reopen(tmp_path, {"losses": []}, ("losses",))
    assert (tmp_path / name).exists()


def test_a_file_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match=r"--out .*file cannot be a run folder"):
        Record.create(tmp_path / "file", {"losses": []})


def test_other_data_of_the_same_name_is_another_configuration(tmp_path):
    one, other = ({"losses": [], "data": {"sha256": sha}} for sha in ("a", "b"))
    record = Record.create(tmp_path / "r", one)
    assert record.matches(one, ("losses",)) and not record.matches(other, ("losses",))
    with pytest.raises(LabError, match="was made with data"):
        Record.reopen(record.folder, other, ("losses",))
