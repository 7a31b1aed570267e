"""`softsphere tune`: what is tried, what is said of the rates, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest

from softsphere_lab.cli import app as cli
from softsphere_lab.experiments.on_text.rate_sweep import RateSweep

SMALL = [
    "tune",
    "--epochs",
    "1",
    "--words",
    "300",
    "--rates",
    "0.001,0.01",
    "--layer-rates",
    "0.1,1",
]
OUTPUTS = ["--output", "z_loss", "--output", "taylor_softmax factored"]


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def command(*arguments: str) -> int:
    sys.argv = ["softsphere", *arguments]
    return cli.main()


def test_each_rate_is_tried_once_and_resuming_does_only_what_is_missing(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    tried = []
    real = RateSweep.train
    monkeypatch.setattr(
        RateSweep, "train", lambda self, task, *a: tried.append(task.loss) or real(self, task, *a)
    )
    assert command(*SMALL, *OUTPUTS[2:], "--out", str(out)) == 0
    assert tried == ["taylor_softmax factored rate=0.1", "taylor_softmax factored rate=1.0"]
    assert command(*SMALL, *OUTPUTS, "--out", str(out), "--resume") == 0
    assert tried[2:] == ["z_loss lr=0.001", "z_loss lr=0.01"]
    finals = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    finals = [line["final"] for line in finals if "final" in line]
    assert len(finals) == 4 and all(final["test_mrr"] is None for final in finals)
    assert (out / "plateaus.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out.splitlines()
    assert "log-Taylor softmax, factored, SGD: begin with " in said[-1] and "· D" in said[-1]
    assert "Z-loss: begin with 0.0" in said[-1] and " was not tried" in said[-1]
    row = next(line for line in said[::-1] if line.startswith("| Z-loss"))
    # it has no probabilities, and so no perplexity
    assert row.split(" | ")[3] == "–"


WRONG = {
    "dataset": (["--dataset", "nothing"], "nothing"),
    "output": (["--output", "softmaxx"], "--output begins with one of squared_error, "),
    "no output": (["--output", " "], "got ' '"),
    "word of an output": (["--output", "softmax deep"], "'deep'"),
    "number of a loss": (["--output", "z_loss:c=1"], "--output: z_loss takes a, b"),
    "rate of an output": (["--output", "taylor_softmax factored rate=1"], "leave rate= out"),
    "softmax in factors": (["--output", "softmax factored"], "--output softmax factored: "),
    "rates": (["--rates", "0.1;1"], "must be numbers with commas"),
    "no rate": (["--rates", ""], "must be numbers with commas"),
    "negative rate": (["--layer-rates", "-1,1"], "--layer-rates must be a positive number"),
    "rate nan": (["--rates", "nan"], "positive"),
    "words": (["--words", "0"], "--words must be at least 1"),
    "more words than there are": (["--words", "999999"], "or fewer --words"),
    "seeds": (["--seeds", "0"], "at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, word = WRONG[case]
    assert command("tune", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("softsphere: ") and len(said.splitlines()) == 1
    assert word in said
    assert list(tmp_path.iterdir()) == []
