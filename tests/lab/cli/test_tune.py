"""`softsphere tune`: what is tried, what is said of the rates, and what is refused."""

from __future__ import annotations

import json
import re
import sys

import pytest

from _data_folder import write_columns
from softsphere_lab.cli import app as cli
from softsphere_lab.experiments.on_text.rate_sweep import RATE_FINDER, RateSweep
from softsphere_lab.records.folder import Record

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


@pytest.fixture
def tried(monkeypatch) -> list[tuple[str, float, int]]:
    """The name, AdamW's rate and the seed of each run that is trained."""
    found = []
    real = RateSweep.train

    def train(self, task, *others):
        found.append((task.loss, task.lr, task.seed))
        return real(self, task, *others)

    monkeypatch.setattr(RateSweep, "train", train)
    return found


def test_each_rate_is_tried_once_and_resuming_does_only_what_is_missing(tmp_path, capsys, tried):
    out = tmp_path / "run"
    assert command(*SMALL, *OUTPUTS[2:], "--out", str(out)) == 0
    factored = "taylor_softmax factored rate="
    assert tried == [(f"{factored}0.1", 0.003, 0), (f"{factored}1.0", 0.003, 0)]
    # more layers and more rates, between those that were tried and beyond them
    more = ["--rates", "0.01,0.002,0.001", "--layer-rates", "1,0.5,0.1"]
    assert command(*SMALL, *OUTPUTS, *more, "--out", str(out), "--resume") == 0
    assert set(tried[2:]) == {
        (f"{factored}0.5", 0.003, 0),
        *((f"z_loss lr={rate}", rate, 0) for rate in (0.001, 0.002, 0.01)),
    }
    assert len(tried) == 6
    finals = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    finals = [line["final"] for line in finals if "final" in line]
    assert len(finals) == 6 and all(final["test_mrr"] is None for final in finals)
    panels = RATE_FINDER.section(Record(out)).pictures["plateaus"].args[0]
    assert set(panels) == {"rate of AdamW", "rate of FactoredSGD / D, with 0.003 for AdamW below"}
    assert (out / "plateaus.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out.splitlines()
    assert re.search(
        r"log-Taylor softmax, factored, SGD: begin with \S+ · D, which is lr=[\d.]+ with D = \d+, "
        r"if AdamW has 0.003 below it",
        said[-1],
    )
    assert "Z-loss: begin with 0.0" in said[-1] and " was not tried" in said[-1]
    rows = [line.split(" | ") for line in said if line.startswith("| ")]
    places = {title: place for place, title in enumerate(rows[-4])}
    z_loss, factored = rows[-1], rows[-2]
    # Z-loss has no probabilities, and so no perplexity
    assert rows[-4][0] == "| output layer" and z_loss[0] == "| Z-loss"
    assert z_loss[places["perplexity"]] == "–" != factored[places["perplexity"]]
    assert [row[places["AdamW below"]] for row in (z_loss, factored)] == ["–", "0.003"]


def test_a_dataset_in_folders_and_with_brackets_has_one_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part, sentences in (("train", 200), ("validation", 100), ("test", 100)):
        file = tmp_path / "texts" / "mine [1]" / f"{part}.parquet"
        write_columns(file, sentence=["one two three"] * sentences)
    capsys.readouterr()
    asked = ["tune", "--dataset", "texts/mine [1]", "--data-dir", ".", "--epochs", "1"]
    asked += ["--output", "softmax", "--rates", "0.01"]
    assert command(*asked) == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.endswith("-tune-texts-mine--1-") and (made / "README.md").exists()
    assert command(*asked, "--resume") == 0
    assert [*(tmp_path / "runs").iterdir()] == [made]


def test_options_reach_the_runs_and_the_record(tmp_path, tried, capsys):
    out = tmp_path / "run"
    given = {"seeds": 2, "epochs": 1, "words": 300, "batch-size": 32, "rate-below": 0.02}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    call = ["tune", *options, *OUTPUTS[2:], "--layer-rates", "0.1", "--out", str(out)]
    assert command(*call) == 0
    name = "taylor_softmax factored rate=0.1"
    assert tried == [(name, 0.02, 0), (name, 0.02, 1)]
    config = json.loads((out / "config.json").read_text("utf-8"))
    asked = {"dataset": "generated", "outputs": [name], "seeds": [0, 1], "epochs": 1}
    asked |= {"batch_size": 32, "rate_below": 0.02, "device": "cpu"}
    assert {key: config[key] for key in asked} == asked
    assert config["train"] == 300 == config["data"]["train"]
    # of two seeds each, so that the table has a mean
    assert len((out / "metrics.jsonl").read_text("utf-8").splitlines()) == 4
    for other in (["--rate-below", "0.01"], ["--words", "200"], ["--batch-size", "16"]):
        assert command(*call, *other, "--resume") == 2
        key = other[0].strip("-").replace("-", "_").replace("words", "train")
        assert f"was made with {key} = " in capsys.readouterr().err
    assert len(tried) == 2


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
    "rate below": (["--rate-below", "0"], "--rate-below must be a positive number"),
    "batch size": (["--batch-size", "0"], "--batch-size must be at least 1"),
    "epochs": (["--epochs", "0"], "--epochs must be at least 1"),
    "device": (["--device", "tpu"], "--device tpu cannot be used"),
    "jobs": (["--jobs", "0"], "--jobs must be at least 1"),
    "out": (["--out", ""], "--out"),
    "folder of data": (["--data-dir", "nowhere"], "leave --data-dir out"),
    "no folder of data": (["--dataset", "ptb", "--data-dir", "nowhere"], "nowhere"),
    "nothing to resume": (["--resume"], "was made with these options"),
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
