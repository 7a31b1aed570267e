"""`softsphere twins` and `engines` on a small generated text: same curves, whole records."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from softsphere_lab.cli import app as cli
from softsphere_lab.data import text
from softsphere_lab.experiments import engines, side_by_side, twins


@pytest.fixture
def folder(tmp_path) -> Path:
    """A text of 40 words whose next word depends on the last."""
    import datasets

    chance = random.Random(0)
    words = [f"w{i}" for i in range(40)]

    def sentence() -> str:
        at, said = chance.randrange(40), []
        for _ in range(8):
            said.append(words[at])
            at = (3 * at + chance.randrange(3)) % 40
        return " ".join(said)

    (tmp_path / "sets" / "tiny").mkdir(parents=True)
    for part, count in (("train", 120), ("validation", 20), ("test", 20)):
        table = datasets.Dataset.from_dict({"sentence": [sentence() for _ in range(count)]})
        table.to_parquet(str(tmp_path / "sets" / "tiny" / f"{part}.parquet"))
    return tmp_path / "sets"


# What each command is given besides the folders, and the engines that it compares.
COMMANDS = {
    "twins": (["--batch-size", "16", "--lr", "0.05"], twins.ENGINES),
    "engines": (["--batch-size", "4", "--length", "6"], engines.engines("cpu")),
}


def command(monkeypatch, name: str, folder: Path, out: Path, *extra: str) -> int:
    arguments = [
        *("--data-dir", str(folder), "--dataset", "tiny", "--out", str(out), "--epochs", "2"),
        *("--width", "8", "--embedding", "4", *COMMANDS[name][0]),
    ]
    monkeypatch.setattr(sys, "argv", ["softsphere", name, *arguments, *extra])
    return cli.main()


def curves(out: Path, name: str) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (out / side_by_side.RUNS).read_text().splitlines()]
    return {
        engine: [
            line["valid_loss"] for line in lines if line["engine"] == engine and "epoch" in line
        ]
        for engine in COMMANDS[name][1]
    }


def test_the_words_ngrams_and_windows_of_a_text(folder):
    tiny = text.load("tiny", folder)
    assert len(tiny.words) == 42  # with the end of a sentence and the unknown word
    assert tiny.words[0] == text.END
    assert tiny.counts.tolist() == sorted(tiny.counts.tolist(), reverse=True)
    x, y = text.ngrams(torch.tensor([5, 6, 7]), 3, end=0)
    assert x.tolist() == [[0, 0], [0, 5], [5, 6]]
    assert y.tolist() == [5, 6, 7]
    x, y = text.windows(torch.tensor([5, 6, 7, 8, 9]), 2, end=0)
    assert x.tolist() == [[0, 5], [6, 7]]
    assert y.tolist() == [[5, 6], [7, 8]]


TOLERANCE = {"float32": 1e-4, "float64": 1e-11}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("twins", []),
        ("twins", ["--momentum", "0.9"]),
        ("twins", ["--no-prior", "--loss", "z_loss"]),
        ("engines", []),
        ("engines", ["--no-prior", "--loss", "squared_error"]),
    ],
)
def test_all_engines_have_the_same_curve(folder, tmp_path, monkeypatch, capsys, name, extra, dtype):
    out = tmp_path / "run"
    assert command(monkeypatch, name, folder, out, *extra, "--dtype", dtype) == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "environment.jsonl",
        "metrics.jsonl",
        "table.md",
        "curves.png",
    }
    *others, reference = curves(out, name).values()
    assert len(reference) == 2
    assert reference[1] < reference[0]
    for curve in others:
        assert curve == pytest.approx(reference, rel=TOLERANCE[dtype])
    assert "differ by at most" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "module"), [("twins", twins), ("engines", engines)])
def test_resume_does_the_engine_that_is_missing(
    folder, tmp_path, monkeypatch, capsys, name, module
):
    out, real = tmp_path / "run", module.run

    def stopped(plan, engine, *rest):
        if engine == "dense":
            raise KeyboardInterrupt
        return real(plan, engine, *rest)

    monkeypatch.setattr(module, "run", stopped)
    assert command(monkeypatch, name, folder, out) == 130
    assert "--resume" in capsys.readouterr().out
    trained = []
    monkeypatch.setattr(module, "run", lambda p, e, *r: trained.append(e) or real(p, e, *r))
    assert command(monkeypatch, name, folder, out, "--resume") == 0
    assert trained == ["dense"]


@pytest.mark.parametrize(
    ("name", "extra", "words"),
    [
        ("twins", ["--loss", "softmax"], "taylor_softmax"),
        ("twins", ["--n", "1"], "--n"),
        ("twins", ["--dataset", "nowhere"], "nowhere"),
        ("twins", ["--lr", "-1"], "--lr"),
        ("twins", ["--device", "tpu9"], "--device tpu9"),
        ("twins", ["--dtype", "int8"], "--dtype"),
        ("engines", ["--loss", "softmax"], "taylor_softmax"),
        ("engines", ["--length", "0"], "--length"),
    ],
)
def test_wrong_options_are_one_line(folder, tmp_path, monkeypatch, capsys, name, extra, words):
    assert command(monkeypatch, name, folder, tmp_path / "run", *extra) == 2
    said = capsys.readouterr().err
    assert said.startswith("softsphere: ")
    assert len(said.splitlines()) == 1
    assert words in said
    assert not (tmp_path / "run").exists()
