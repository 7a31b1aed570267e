"""What a record lacks is done, in one process or in several, and nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import pytest
import torch

from _lab_studies import IMAGES, TEXT
from _stopped_commands import asked, kept_lines, lines, start, stop
from softsphere_lab.cli import app
from softsphere_lab.errors import LabError
from softsphere_lab.models.output_layers import Output
from softsphere_lab.progress import standard_console
from softsphere_lab.records.folder import Record
from softsphere_lab.study import protocol as study
from softsphere_lab.study import work


def test_a_finished_run_leaves_no_state(tmp_path):
    record = Record.create(tmp_path / "r", IMAGES.config())
    work.work(IMAGES, IMAGES.load(), record, standard_console())
    assert {path.name for path in record.folder.iterdir()} == {
        "config.json",
        "environment.jsonl",
        study.TRIALS,
        study.RUNS,
    }


def test_every_process_has_what_is_made_from_the_data(tmp_path):
    output = Output("taylor_softmax", clusters=4, shortlist=20)
    asked = replace(TEXT, outputs=(output,), setup=replace(TEXT.setup, epochs=1))
    record = Record.create(tmp_path / "r", asked.config())
    work.work(asked, asked.load(), record, standard_console(), jobs=2)
    assert len(ends := [line for line in record.lines(study.RUNS) if "final" in line]) == 2
    assert not any(line["final"]["diverged"] for line in ends)
    assert [path.name for path in (record.folder / "clusters").iterdir()] == [
        "meaning-4-shortlist-20.pt"
    ]


def test_a_process_of_a_job_that_finds_no_data_says_so(tmp_path):
    gone = replace(TEXT, dataset="ptb", data_dir=tmp_path / "nowhere")
    record = Record.create(tmp_path / "r", TEXT.config())
    with pytest.raises(LabError, match="nowhere"):
        work.work(gone, TEXT.load(), record, standard_console(), jobs=2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["mnist", pytest.param("ptb", marks=pytest.mark.slow)])
def test_stopped_again_and_again_nothing_is_lost_and_nothing_goes_on_alone(
    name, tmp_path, monkeypatch
):
    """By Ctrl-C in the search, where it says how to go on, and by a kill in the final runs."""
    folder = tmp_path / "run"
    jobs = "2" if (os.cpu_count() or 1) > 1 else "1"
    process = start(name, folder, "--jobs", jobs)
    said = stop(process, folder / study.TRIALS, signal.SIGINT)
    assert process.returncode == 130
    assert "--resume --out" in said and "Traceback" not in said
    kept = kept_lines(folder)
    stop(start(name, folder, "--resume"), folder / study.RUNS, signal.SIGKILL)
    assert kept <= kept_lines(folder)
    kept = kept_lines(folder)
    process = start(name, folder, "--resume")
    _, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    assert kept <= kept_lines(folder)
    assert not (folder / "unfinished").exists()
    whole = tmp_path / "whole"
    monkeypatch.setattr(sys, "argv", ["softsphere", *asked(name, whole)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert app.main() == 0
    torch.set_num_threads(threads)
    assert sorted(lines(folder)) == sorted(lines(whole))
