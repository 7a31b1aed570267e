"""`softsphere twins` on a small generated text: same curves, whole records, one-line errors."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from softsphere.lab import cli, text, twins


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


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["softsphere", "twins", *arguments])
    return cli.main()


def options(folder: Path, out: Path) -> list[str]:
    return [
        *("--data-dir", str(folder), "--dataset", "tiny", "--out", str(out), "--epochs", "2"),
        *("--width", "8", "--embedding", "4", "--batch-size", "16", "--lr", "0.05"),
    ]


def test_the_words_and_ngrams_of_a_text(folder):
    tiny = text.load("tiny", folder)
    assert len(tiny.words) == 42  # with the end of a sentence and the unknown word
    assert tiny.words[0] == text.END
    assert tiny.counts.tolist() == sorted(tiny.counts.tolist(), reverse=True)
    x, y = text.ngrams(torch.tensor([5, 6, 7]), 3, end=0)
    assert x.tolist() == [[0, 0], [0, 5], [5, 6]]
    assert y.tolist() == [5, 6, 7]


TOLERANCE = {"float32": 1e-4, "float64": 1e-11}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("extra", [[], ["--momentum", "0.9"], ["--no-prior", "--loss", "z_loss"]])
def test_both_layers_have_the_same_curve(folder, tmp_path, monkeypatch, capsys, extra, dtype):
    out = tmp_path / "run"
    assert command(monkeypatch, *options(folder, out), *extra, "--dtype", dtype) == 0
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "environment.jsonl",
        "metrics.jsonl",
        "table.md",
        "twins.png",
    }
    lines = [json.loads(line) for line in (out / twins.RUNS).read_text().splitlines()]
    losses = {
        engine: [
            line["valid_loss"] for line in lines if line["engine"] == engine and "epoch" in line
        ]
        for engine in twins.ENGINES
    }
    assert len(losses["factored"]) == 2
    assert losses["factored"] == pytest.approx(losses["dense"], rel=TOLERANCE[dtype])
    assert losses["factored"][1] < losses["factored"][0]
    assert "The two curves differ by at most" in capsys.readouterr().out


def test_resume_does_the_engine_that_is_missing(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    real = twins.run

    def stopped(plan, engine, *rest):
        if engine == "dense":
            raise KeyboardInterrupt
        real(plan, engine, *rest)

    monkeypatch.setattr(twins, "run", stopped)
    assert command(monkeypatch, *options(folder, out)) == 130
    assert "--resume" in capsys.readouterr().out
    trained = []
    monkeypatch.setattr(twins, "run", lambda p, e, *r: trained.append(e) or real(p, e, *r))
    assert command(monkeypatch, *options(folder, out), "--resume") == 0
    assert trained == ["dense"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--loss", "softmax"], "taylor_softmax"),
        (["--n", "1"], "--n"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--lr", "-1"], "--lr"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_wrong_options_are_one_line(folder, tmp_path, monkeypatch, capsys, extra, words):
    assert command(monkeypatch, *options(folder, tmp_path / "run"), *extra) == 2
    said = capsys.readouterr().err
    assert said.startswith("softsphere: ")
    assert len(said.splitlines()) == 1
    assert words in said
    assert not (tmp_path / "run").exists()
