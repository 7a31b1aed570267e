"""The main job from the outside: what is trained, what is kept, what is said."""

from __future__ import annotations

import html
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from _systems import posix
from softsphere_lab.cli import app as cli
from softsphere_lab.data import images as data
from softsphere_lab.experiments.on_images import classification
from softsphere_lab.experiments.page import Report
from softsphere_lab.records.folder import Record
from softsphere_lab.report.measures import note_on
from softsphere_lab.study import protocol as study
from softsphere_lab.training import image_run as training

SMALL = ["compare", "--epochs", "2", "--batch-size", "256"]


def command(*arguments: str) -> int:
    """The command line's exit code."""
    sys.argv = ["softsphere", *arguments]
    return cli.main()


def lines(folder: Path, name: str = study.RUNS) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    """Everything that is measured, but for the clock."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k != "seconds"}
        return value

    return [plain(line) for line in lines(folder)]


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_a_run_leaves_a_whole_folder_and_says_what_was_found(tmp_path, capsys):
    out = tmp_path / "run"
    # another way to the same folder, which is there only once the run has begun
    page = out / ".." / "run" / "page.HTML"
    assert command(*SMALL, "--seeds", "2", "--out", str(out), "--html", str(page)) == 0
    said = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "environment.jsonl",
        "metrics.jsonl",
        "README.md",
        "table.csv",
        "comparison.png",
        "page.HTML",
    }
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((out / "config.json").read_text())
    assert config["seeds"] == [0, 1] and config["epochs"] == 2 and config["dataset"] == "digits"
    environment = lines(out, "environment.jsonl")[0]
    assert environment["command"].startswith("softsphere compare --epochs 2")
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    finals = [line for line in lines(out) if "final" in line]
    epochs = [line for line in lines(out) if "epoch" in line]
    assert len(finals) == 2 * 5 and len(epochs) == 2 * 5 * 2
    with_likelihood = {line["loss"] for line in finals if line["final"]["test_nll"] is not None}
    assert with_likelihood == {"softmax", "taylor_softmax", "spherical_softmax"}
    assert str(out / "comparison.png") in said.replace("\n", "")
    assert "softmax (" in said.splitlines()[-2] and said.splitlines()[-1] == f"Page: {page}"
    assert said.splitlines()[-2] in html.unescape(page.read_text("utf-8"))
    note = note_on("1 ± 2")
    assert note in said and note in (out / "README.md").read_text()


def test_same_seeds_give_the_same_numbers_and_different_seeds_others(tmp_path):
    for name in ("a", "b"):
        command(*SMALL, "--seeds", "2", "--losses", "taylor_softmax", "--out", str(tmp_path / name))
    assert untimed(tmp_path / "a") == untimed(tmp_path / "b")
    finals = [line["final"]["test_nll"] for line in lines(tmp_path / "a") if "final" in line]
    assert len(set(finals)) == 2


def test_resume_does_only_what_is_missing_and_ends_as_one_run_would(tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = ("--losses", "softmax,spherical_softmax", "--tune")
    command(*SMALL, *options, "--seeds", "2", "--out", str(whole))
    command(*SMALL, *options, "--seeds", "1", "--out", str(part))
    trained = []
    real = classification.train
    monkeypatch.setattr(
        classification, "train", lambda *a, **k: trained.append(a[3]) or real(*a, **k)
    )
    assert command(*SMALL, *options, "--seeds", "2", "--out", str(part), "--resume") == 0
    assert trained == [1, 1]
    assert sorted(map(str, untimed(part))) == sorted(map(str, untimed(whole)))
    assert command(*SMALL, *options, "--seeds", "2", "--out", str(part), "--resume") == 0
    assert trained == [1, 1]


def test_resume_knows_a_loss_by_all_its_digits_and_by_any_spelling(tmp_path, monkeypatch):
    out = ["--seeds", "1", "--epochs", "1", "--out", str(tmp_path / "run")]
    losses = "spherical_softmax:eps=0.123456789,z_loss"
    assert command("compare", *out, "--losses", losses) == 0
    before = lines(tmp_path / "run")
    monkeypatch.setattr(classification, "train", None)
    again = "z_loss:b=4:a=1,spherical_softmax:eps=0.123456789"
    assert command("compare", *out, "--losses", again, "--resume") == 0
    assert lines(tmp_path / "run") == before
    assert json.loads((tmp_path / "run/config.json").read_text())["losses"] == losses.split(",")


def test_resume_refuses_other_data(tmp_path, monkeypatch, capsys):
    out = ["--losses", "softmax", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert command("compare", *out) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["train"] == 1437
    real = data.digits

    def other():
        train, test, classes = real()
        return data.Split(train.x.flip(3), train.y), test, classes

    monkeypatch.setattr(data, "digits", other)
    assert command("compare", *out, "--resume") == 2
    assert "was made with data.sha256 = " in capsys.readouterr().err


def test_resume_refuses_another_configuration_and_names_what_differs(tmp_path, capsys):
    out = str(tmp_path / "run")
    command(*SMALL, "--seeds", "1", "--losses", "softmax", "--out", out)
    assert command(*SMALL, "--lr", "0.1", "--seeds", "1", "--out", out, "--resume") == 2
    assert "search.lr.values = [0.001], not [0.1]" in capsys.readouterr().err
    assert command(*SMALL, "--seeds", "1", "--out", out) == 2
    assert "not empty" in capsys.readouterr().err


def test_resume_without_a_folder_takes_the_newest_of_the_same_configuration(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    one = [*SMALL, "--seeds", "1", "--losses", "softmax"]
    assert command(*one, "--resume") == 2
    assert "leave --resume out" in capsys.readouterr().err
    assert command(*one, "--out", "runs/20260101-000000-compare-digits") == 0
    assert command(*one, "--lr", "0.1", "--out", "runs/20260102-000000-compare-digits") == 0
    assert command(*one, "--resume") == 0
    assert "20260101" in capsys.readouterr().out.splitlines()[-2]
    # a spoiled neighbour is in nobody's way
    spoiled = tmp_path / "runs/20260103-000000-compare-digits"
    spoiled.mkdir()
    (spoiled / "config.json").write_text("{")
    assert command(*one, "--resume") == 0


@posix
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_an_interrupt_keeps_what_is_finished(tmp_path, name):
    sent = getattr(signal, name)
    out = tmp_path / "a run"
    arguments = [*SMALL, "--seeds", "200", "--losses", "softmax,z_loss", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "softsphere_lab", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a process that was started in the background ignores Ctrl-C, and so do its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 60
    while not (out / study.RUNS).exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(sent)
    said, wrong = process.communicate(timeout=60)
    finals = [line for line in lines(out) if "final" in line]
    assert finals
    # every run is whole: its epochs are there if and only if its end is
    assert len(lines(out)) == 3 * len(finals)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert f"--resume --out '{out}' does" in said and "Traceback" not in wrong
        assert (out / "README.md").exists()


def test_an_interrupt_of_the_report_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """Nothing is left to train by then, and what was trained is not reported in part."""
    out = tmp_path / "run"
    asked = [*SMALL, "--losses", "softmax", "--seeds", "1", "--out", str(out)]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Report, "put", interrupted)
        assert command(*asked) == 130
    assert f"--resume --out {out} does the rest" in capsys.readouterr().out
    assert command(*asked, "--resume") == 0
    assert (out / "README.md").exists()


@posix
def test_a_closed_standard_output_is_in_nobodys_way(tmp_path):
    out = tmp_path / "run"
    asked = [*SMALL, "--losses", "softmax", "--seeds", "1", "--out", str(out)]
    script = f"{shlex.join([sys.executable, '-m', 'softsphere_lab', *asked])} >&-"
    done = subprocess.run(["sh", "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / "README.md").exists()


def test_the_search_is_recorded_has_the_same_rates_for_all_and_never_reads_the_test_set(tmp_path):
    out = tmp_path / "run"
    options = ["--losses", "softmax,spherical_softmax", "--seeds", "1", "--tune"]
    command(*SMALL, *options, "--out", str(out))
    trials = lines(out, study.TRIALS)
    assert all(trial["final"]["test_error"] is None for trial in trials)
    assert {trial["seed"] for trial in trials} == {study.TUNING_SEED}
    rows = [row for row in (out / "README.md").read_text().splitlines() if row.startswith("| s")]
    told = [row.split(" | ")[2] for row in rows]
    assert told == [
        str(sum(t["loss"] == name for t in trials)) for name in ("softmax", "spherical_softmax")
    ]
    for loss in ("softmax", "spherical_softmax"):
        best = min(
            (t for t in trials if t["loss"] == loss),
            key=lambda t: (t["final"]["valid_error"], t["final"]["mean_valid_error"]),
        )
        final = next(line for line in lines(out) if line["loss"] == loss and "final" in line)
        assert (final["setting"], final["lr"]) == (best["setting"], best["lr"])
        # neither it nor a number of the loss's own is at an edge of what was tried
        tried = {t["lr"] for t in trials if t["loss"] == loss and t["setting"] == best["setting"]}
        assert min(tried) < best["lr"] < max(tried)


def test_a_run_that_diverges_says_so_and_is_kept():
    digits = data.load("digits")
    schedule = training.Schedule("mlp", 2, 256, "cpu")
    from softsphere import losses

    history, final = training.train(
        digits, losses.get("squared_error"), 1e20, 0, schedule, read_test=True
    )
    assert final.diverged and len(history) < 2
    assert final.test_error is not None


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ("softmax,z_loss", "--lr 0.01 fixes the learning rate of every loss, so --tune searches"),
        ("softmax,taylor_softmax", "so --tune has nothing to search for"),
    ],
)
def test_a_rate_beside_tune_is_fixed_and_that_is_said(losses, words, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--losses", losses, "--seeds", "1", "--epochs", "1", "--lr", "0.01", "--tune"]
    assert command("compare", "--batch-size", "512", *options, "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert words in said and ("a, b" in said) == ("z_loss" in losses)
    every = lines(out) + (lines(out, study.TRIALS) if "z_loss" in losses else [])
    assert {line["lr"] for line in every} == {0.01}


WRONG = {
    "dataset": (["--dataset", "imagenet"], "digits, mnist, cifar10, cifar100"),
    "loss": (["--losses", "softmaxx"], "taylor_softmax"),
    "hyper-parameter": (["--losses", "z_loss:c=1"], "takes a, b"),
    "value": (["--losses", "spherical_softmax:eps=-1"], "eps"),
    "number": (["--losses", "spherical_softmax:eps=x"], "must be a number"),
    "model": (["--model", "vgg"], "mlp, cnn, lenet, resnet"),
    "seeds": (["--seeds", "0"], "at least 1"),
    "far too many seeds": (["--seeds", "10001"], "at most 10000"),
    "far too many epochs": (["--epochs", "100001"], "at most 100000"),
    "far too large a batch": (["--batch-size", str(2**31)], "at most 2147483647"),
    "seeds as a word": (["--seeds", "many"], "--seeds"),
    "epochs": (["--epochs", "-3"], "at least 1"),
    "jobs": (["--jobs", "5000"], "--jobs must be at least 1 and at most"),
    "batch": (["--batch-size", "0"], "at least 1"),
    "rate": (["--lr", "-1"], "positive"),
    "rate nan": (["--lr", "nan"], "positive"),
    "rate beyond float32": (["--lr", "1e39"], "float32"),
    "a loss twice over": (["--losses", "z_loss:a=1:a=2"], "given a twice"),
    "device without numbers": (["--device", "meta"], "--device meta"),
    "device of another torch": (["--device", "hpu"], "--device hpu"),
    "device": (["--device", "tpu9"], "--device tpu9"),
    "option": (["--bogus"], "--bogus"),
    "folder": (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere: there is no such"),
    "folder for digits": (["--data-dir", "."], "leave --data-dir out"),
    "no folder": (["--out", ""], "--out"),
    "a page in no folder": (["--html", "nowhere/page.html"], "there is no folder nowhere"),
    "a folder for a page": (["--html", "."], "is a folder; name a file, such as page.html"),
    "a page over a record": (["--html", "config.json"], "the name of a page ends in .html"),
    "no page": (["--html", ""], "--html"),
    "a file for a folder": (["--out", str(Path(__file__) / "run")], "test_compare.py"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, word = WRONG[case]
    assert command("compare", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("softsphere: ") and len(said.splitlines()) == 1
    assert word in said
    assert list(tmp_path.iterdir()) == []


def test_images_that_the_network_cannot_take_are_refused_before_a_folder_is_made(
    tmp_path, monkeypatch, capsys
):
    real = data.digits

    def tiny():
        train, test, classes = real()
        return data.Split(train.x[..., :2], train.y), data.Split(test.x[..., :2], test.y), classes

    monkeypatch.setattr(data, "digits", tiny)
    assert command("compare", "--model", "cnn", "--out", str(tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "--model cnn cannot take images of 1 × 8 × 2" in said and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_record_is_whole_after_a_failed_write(tmp_path, monkeypatch):
    record = Record.create(tmp_path / "r", {"a": 1})
    record.add("x.jsonl", [{"n": 1}])

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        record.add("x.jsonl", [{"n": 2}])
    assert record.lines("x.jsonl") == [{"n": 1}]
    assert not [path for path in record.folder.iterdir() if path.name.startswith(".")]
