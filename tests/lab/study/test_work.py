"""A run that is stopped at any moment goes on as if it had not been."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softsphere_lab.errors import LabError
from softsphere_lab.experiments.on_images.classification import Classification
from softsphere_lab.experiments.on_text.language_modelling import LanguageModelling
from softsphere_lab.models.output_layers import Output
from softsphere_lab.progress import standard_console
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Record
from softsphere_lab.study import protocol as study
from softsphere_lab.study import work
from softsphere_lab.study.protocol import Task
from softsphere_lab.study.search import Axis
from softsphere_lab.study.spec import LossSpec
from softsphere_lab.training import run
from softsphere_lab.training.image_run import Schedule
from softsphere_lab.training.language_run import LanguageRun, Setup

IMAGES = Classification(
    dataset="digits",
    losses=(LossSpec.parse("taylor_softmax"), LossSpec.parse("softmax")),
    seeds=(0, 1),
    # with all that a schedule can have: dropout in the network, warm-up, decay
    schedule=Schedule("mlp", 3, 256, "cpu", warm_up=0.2, weight_decay=0.1),
    rates=Axis((1e-3, 3e-3), 1e-3),
    trial_epochs=1,
)
TEXT = LanguageModelling(
    dataset="generated",
    outputs=(Output("taylor_softmax"),),
    seeds=(0, 1),
    setup=Setup(embedding=8, hidden=16, width=16, batch_size=128, epochs=3, held=200),
    rates=Axis.fixed(3e-3),
    layer_rates=Axis.fixed(0.1),
    trial_epochs=1,
)
# So high that the first epoch is the best, which a run that goes on has to remember.
HARMFUL = 0.3
# What is stopped, and what of it: every kind of output layer has a state of its own.
RUNS = {
    "images": (IMAGES, "taylor_softmax"),
    "images, the first epoch the best": (IMAGES, "softmax"),
    "augmented in bfloat16": (
        replace(
            IMAGES, schedule=replace(IMAGES.schedule, model="lenet", augment=True, bfloat16=True)
        ),
        "softmax",
    ),
    **{
        name: (TEXT, name)
        for name in (
            "softmax",
            "taylor_softmax prior",
            "taylor_softmax factored rate=0.1",
            "taylor_softmax prior factored rate=0.1",
            "z_loss",
            "adaptive_softmax",
            "hierarchical_softmax",
            "taylor_softmax lstm",
            "softmax depth=1 activation=batchnorm",
            "softmax classes=50",
        )
    },
}


def untimed(value):
    """Everything that is measured, but for the clock."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if key != "seconds"}
    return [untimed(each) for each in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_is_stopped_after_an_epoch_ends_as_one_that_was_not(case, tmp_path, monkeypatch):
    # also of epochs as short as these
    monkeypatch.setattr(run, "FEWEST_STEPS", 1)
    asked, name = RUNS[case]
    lr = HARMFUL if "the best" in case else 3e-3
    task, data = Task(name, name, lr, 0, trial=False), asked.load()
    whole = asked.train(task, data, Checkpoint(), lambda *_: None)
    assert (whole[1]["best_epoch"] == 1) or lr != HARMFUL
    file = tmp_path / "kept" / "run.pt"
    stops = []

    def stop(epoch, epochs):
        stops.append(epoch)
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            asked.train(task, data, Checkpoint(file), stop)
    torch.manual_seed(12345)
    part = asked.train(task, data, Checkpoint(file), lambda epoch, _: stops.append(epoch))
    assert stops == [1, 2, 3]
    assert untimed(part) == untimed(whole)


class Stopping(Checkpoint):
    """Is stopped when it has saved so many times."""

    saves = 0

    def save(self, state):
        super().save(state)
        self.saves -= 1
        if not self.saves:
            raise KeyboardInterrupt


class Counting(Checkpoint):
    """Counts the epochs that are done whenever the state is kept."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def save(self, state):
        self.epochs.append(len(state["history"]))


def test_short_epochs_are_not_kept_one_by_one():
    asked = replace(IMAGES, schedule=replace(IMAGES.schedule, epochs=40))
    task, kept = Task("softmax", "softmax", 1e-3, 0, trial=False), Counting()
    asked.train(task, asked.load(), kept, lambda *_: None)
    # 6 steps each
    assert kept.epochs == [17, 34]


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_is_stopped_within_an_epoch_ends_as_one_that_was_not(
    case, tmp_path, monkeypatch
):
    asked, name = RUNS[case]
    task, data = Task(name, name, 3e-3, 0, trial=False), asked.load()
    monkeypatch.setattr(run, "STEPS", 1)
    whole = asked.train(task, data, Checkpoint(), lambda *_: None)
    kept = Stopping(tmp_path / "kept" / "run.pt")
    for steps in (1, 3, 2):
        kept.saves = steps
        with pytest.raises(KeyboardInterrupt):
            asked.train(task, data, kept, lambda *_: None)
        assert kept.load()["under way"]["done"]
    torch.manual_seed(12345)
    assert untimed(asked.train(task, data, kept, lambda *_: None)) == untimed(whole)


def test_a_spoiled_state_is_named_and_what_would_do(tmp_path):
    file = tmp_path / "run.pt"
    file.write_bytes(b"half a file")
    with pytest.raises(LabError, match=r"run\.pt cannot be read .* delete it"):
        Checkpoint(file).load()


def test_states_of_several_runs_come_and_go_without_minding_each_other(tmp_path):
    states = [Checkpoint(tmp_path / "unfinished" / f"{i}.pt") for i in range(2)]

    def come_and_go(state: Checkpoint) -> None:
        for epoch in range(200):
            state.save({"epoch": epoch})
            assert state.load()["epoch"] == epoch
            state.remove()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(come_and_go, states))


def test_a_network_that_gives_no_numbers_is_last_everywhere_and_has_diverged():
    data = TEXT.load()
    for name in ("softmax", "z_loss", "taylor_softmax factored rate=0.1", "adaptive_softmax",
                 "hierarchical_softmax"):  # fmt: skip
        one = LanguageRun(data.text, Output.parse(name), 3e-3, 0, TEXT.setup)
        with torch.no_grad():
            list(one.model.parameters())[-1].fill_(math.nan)
        ranking = one.ranking("valid")
        assert ranking["top10"] == 0.0 and ranking["mrr"] < 0.02, name
        assert one.nll("valid") is None or math.isnan(one.nll("valid"))
        one.epoch(lambda step: None)
        assert one.diverged and not one.history, name


def test_a_perplexity_past_all_numbers_is_a_run_that_diverged():
    one = LanguageRun(TEXT.load().text, Output.parse("softmax"), 1e-9, 0, TEXT.setup)
    with torch.no_grad():
        for weight in (*one.model.parameters(), *one.head.parameters()):
            weight.mul_(1e3)
    assert math.isfinite(one.nll("valid"))
    one.epoch(lambda step: None)
    assert one.diverged and not one.history


def test_a_finished_run_leaves_no_state(tmp_path):
    record = Record.create(tmp_path / "r", IMAGES.config())
    work.work(IMAGES, IMAGES.load(), record, standard_console())
    assert {path.name for path in record.folder.iterdir()} == {
        "config.json",
        "environment.jsonl",
        study.TRIALS,
        study.RUNS,
    }


def lines(folder: Path) -> list:
    return [
        json.dumps(untimed(json.loads(line)))
        for name in (study.TRIALS, study.RUNS)
        for line in (folder / name).read_text().splitlines()
    ]


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = ["reproduce", "ptb", "--budget", "smoke", "--out", str(folder), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "softsphere_lab", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # sums of several threads differ in the last digit from those of one
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def workers(pid: int) -> list[int]:
    """The processes that one has begun, and theirs."""
    found = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in workers(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(processes: list[int]) -> bool:
    """Whether all end soon: one that has closed its pipes is seen for some moments yet."""
    end = time.monotonic() + 20
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, processes))


def test_a_process_of_a_job_that_finds_no_data_says_so(tmp_path):
    gone = replace(TEXT, dataset="ptb", data_dir=tmp_path / "nowhere")
    record = Record.create(tmp_path / "r", TEXT.config())
    with pytest.raises(LabError, match="nowhere"):
        work.work(gone, None, record, standard_console(), jobs=2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_again_and_again_nothing_is_lost_and_nothing_goes_on_alone(jobs, tmp_path):
    if int(jobs) > (os.cpu_count() or 1):
        pytest.skip("as many jobs as cores")
    folder = tmp_path / "run"
    kept, more = [], []
    for moment in (1, 3):
        process = start(folder, "--jobs", jobs, *more)
        # a later moment each time: in the search, in the final runs
        end = time.monotonic() + 100
        wanted = study.TRIALS if moment == 1 else study.RUNS
        while process.poll() is None and time.monotonic() < end:
            if (folder / wanted).exists() and len((folder / wanted).read_bytes()) > 10:
                break
            time.sleep(0.02)
        begun = workers(process.pid)
        process.kill()
        # whose pipes are open as long as a process of its own is there
        process.communicate(timeout=60)
        assert all_end(begun)
        now = [line for name in (study.TRIALS, study.RUNS) if (folder / name).exists()
               for line in (folder / name).read_text().splitlines()]  # fmt: skip
        assert set(kept) <= set(now)
        kept, more = now, ["--resume"]
    process = start(folder, "--jobs", jobs, "--resume")
    _, wrong = process.communicate(timeout=120)
    assert process.returncode == 0, wrong
    assert set(kept) <= {
        line
        for name in (study.TRIALS, study.RUNS)
        for line in (folder / name).read_text().splitlines()
    }
    assert not (folder / "unfinished").exists()
    whole = tmp_path / "whole"
    process = start(whole)
    process.communicate(timeout=120)
    assert sorted(lines(folder)) == sorted(lines(whole))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ctrl_c_ends_every_process_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path / "run", "--jobs", "2" if (os.cpu_count() or 1) > 1 else "1")
    end = time.monotonic() + 100
    while not (tmp_path / "run" / study.TRIALS).exists() and time.monotonic() < end:
        time.sleep(0.02)
    begun = workers(process.pid)
    # the terminal tells all of its processes
    os.killpg(process.pid, signal.SIGINT)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume --out" in said and "Traceback" not in wrong + said
    assert all_end(begun)
