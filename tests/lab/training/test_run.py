"""A run that is stopped at any moment ends as if it had not been."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from _lab_runs import HARMFUL, RUNS, Stopping, loaded, of_one_epoch
from _lab_studies import IMAGES, TEXT, untimed
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.study.protocol import Task
from softsphere_lab.training import run
from softsphere_lab.training.language_run import LanguageRun


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_is_stopped_after_an_epoch_ends_as_one_that_was_not(case, tmp_path, monkeypatch):
    # also of epochs as short as these
    monkeypatch.setattr(run, "FEWEST_STEPS", 1)
    asked, name = RUNS[case]
    lr = HARMFUL if "the best" in case else 3e-3
    task, data = Task(name, name, lr, 0, trial=False), loaded(asked, tmp_path)
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
    asked = of_one_epoch(asked)
    task, data = Task(name, name, 3e-3, 0, trial=False), loaded(asked, tmp_path)
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


def test_a_network_that_gives_no_numbers_is_last_everywhere_and_has_diverged():
    data = TEXT.load()
    for name in ("softmax", "z_loss", "taylor_softmax factored rate=0.1", "adaptive_softmax",
                 "hierarchical_softmax", "sampled_softmax samples=20"):  # fmt: skip
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
