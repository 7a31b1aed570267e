"""Every experiment at its smallest budget, and wrong options."""

from __future__ import annotations

import json
import socket
import statistics
import sys

import pytest

from _data_folder import write_columns
from softsphere_lab.cli import app as cli
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.registry import REPRODUCTIONS
from softsphere_lab.records.folder import Record
from softsphere_lab.timing import processes
from softsphere_lab.timing.clock import step_times
from softsphere_lab.timing.processes import Measured
from softsphere_lab.timing.training_steps import LAYERS


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def command(*arguments: str) -> int:
    sys.argv = ["softsphere", *arguments]
    return cli.main()


# Their smallest budgets are those of others, but for the data that they would read.
LIKE_OTHERS = ("cifar100", "wikipedia", "clusters_wikipedia", "twins-float64")


def timed_here(name, setting, effort):
    """As in a process of its own, which tests of timing start."""
    times = step_times(LAYERS[name](setting), setting, effort)
    return Measured(statistics.median(times), None, statistics.mean(times))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else [])
        for name in REPRODUCTIONS
    ],
)
def test_every_experiment_runs_at_its_smallest_budget_without_network(
    name, tmp_path, monkeypatch, capsys
):
    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(processes, "measure", timed_here)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("SOFTSPHERE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert command("reproduce", name, "--budget", "smoke") == 0
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "records").iterdir()
    assert folder.name.endswith(f"-{name}-smoke")
    assert json.loads((folder / "config.json").read_text())["experiment"] == name
    record, experiment = Record(folder), REPRODUCTIONS[name]
    assert experiment.unfinished(record) == ""
    section = experiment.section(record)
    assert section is not None and section.finding in said and section.pictures
    assert section.text in (folder / "README.md").read_text()
    for picture in section.pictures:
        assert (folder / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    # a second run refuses to mix its numbers with these, and resuming has nothing to do
    assert command("reproduce", name, "--budget", "smoke") == 2
    assert "not empty" in capsys.readouterr().err
    before = (folder / "metrics.jsonl").read_bytes()
    assert command("reproduce", name, "--budget", "smoke", "--resume") == 0
    assert (folder / "metrics.jsonl").read_bytes() == before


WRONG = {
    "name": (["imagenet"], "NAME must be one of mnist, cifar10"),
    "budget": (["mnist", "--budget", "huge"], "--budget must be one of smoke, small, full"),
    "no name": ([], "NAME must be one of mnist, "),
    "jobs for engines": (["engines", "--jobs", "2"], "--jobs must be 1 for engines"),
    "an option of another command": (["twins", "--losses", "softmax"], "--losses"),
    "jobs": (["mnist", "--jobs", "0"], "--jobs must be at least 1"),
    "jobs for what is timed": (["scaling", "--jobs", "2"], "--jobs must be 1 for scaling"),
    "data for random rows": (
        ["scaling", "--data-dir", "."],
        "--data-dir has no meaning for scaling",
    ),
    "too many jobs": (["mnist", "--jobs", "5000"], "--jobs must be at least 1 and at most"),
    "no process": (["ptb", "--nproc", "0"], "--nproc must be at least 1"),
    "more processes than rows": (
        ["ptb", "--budget", "smoke", "--nproc", "257"],
        "--nproc must be at most 256, the rows of a batch of softmax, got 257",
    ),
    "more processes than windows": (
        ["ptb", "--budget", "full", "--nproc", "17"],
        "--nproc must be at most 16, the rows of a batch of softmax lstm, got 17",
    ),
    "processes for images": (
        ["mnist", "--nproc", "2"],
        "--nproc must be 1 for mnist, got 2; several processes train the runs of ptb and wikipedia "
        "alone",
    ),
    "processes for clusters": (["clusters", "--nproc", "2"], "--nproc must be 1 for clusters"),
    "processes for what is timed": (["scaling", "--nproc", "2"], "--nproc must be 1 for scaling"),
    "processes and jobs": (
        ["ptb", "--nproc", "2", "--jobs", "2"],
        "--jobs must be 1 with --nproc 2, whose processes train one run together, got 2",
    ),
    "device": (["mnist", "--budget", "smoke", "--device", "tpu9"], "--device tpu9"),
    "device for timing": (["scaling", "--budget", "smoke", "--device", "meta"], "--device"),
    "folder": (["ptb", "--data-dir", "nowhere"], "nowhere"),
    "nothing to resume": (["ptb", "--budget", "smoke", "--resume"], "leave --resume out"),
    "no folder": (["ptb", "--out", ""], "--out"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, words = WRONG[case]
    assert command("reproduce", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("softsphere: ") and len(said.splitlines()) == 1
    assert words in said
    assert list(tmp_path.iterdir()) == []


def test_the_record_of_something_else_is_not_resumed(tmp_path, monkeypatch, capsys):
    record = Record.create(tmp_path / "run", {"experiment": "mnist", "budget": "smoke"})
    given = ("--out", str(record.folder), "--resume")
    # data would come from the network
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("it opens a connection"))
    assert command("reproduce", "mnist", "--budget", "small", *given) == 2
    assert "was made with budget = 'smoke', not 'small'" in capsys.readouterr().err
    assert command("reproduce", "ptb", "--budget", "smoke", *given) == 2
    assert "was made with experiment = 'mnist', not 'ptb'" in capsys.readouterr().err


def test_a_text_that_is_too_small_is_refused_before_a_folder_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "validation", "test"):
        write_columns(tmp_path / "data" / "ptb" / f"{part}.parquet", sentence=["a b c"] * 50)
    assert command("reproduce", "ablation", "--data-dir", "data") == 2
    said = capsys.readouterr().err
    assert "ptb has 200 words to train on, and 200,000 are to be read" in said
    assert not (tmp_path / "records").exists()


def test_a_study_says_whether_several_processes_can_train_its_runs():
    """Also if it is asked for them without the command."""
    images, text = (REPRODUCTIONS[name].studies["smoke"] for name in ("mnist", "ptb"))
    assert text.over_processes(2).nproc == 2
    with pytest.raises(LabError, match="--nproc must be 1, got 2"):
        images.over_processes(2)
