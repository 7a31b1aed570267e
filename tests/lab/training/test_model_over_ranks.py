"""Several processes train a language model as one does."""

from __future__ import annotations

import pytest
import torch

import _ranks
import _trained_on_ranks as trained
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.training import run

pytestmark = [
    pytest.mark.once("ranks are on the CPU"),
    pytest.mark.skipif(not _ranks.AVAILABLE, reason="needs gloo"),
]
NUMBERS = {"rtol": 1e-8, "atol": 1e-10}


def close(found, wanted):
    torch.testing.assert_close(found, wanted, **NUMBERS)


@pytest.fixture
def float64(monkeypatch):
    torch.set_default_dtype(torch.float64)
    # the state of so short epochs is kept as well
    monkeypatch.setattr(run, "FEWEST_STEPS", 1)
    yield
    torch.set_default_dtype(torch.float32)


def on_three(case, folder):
    """What three processes found, each with the same numbers, by which they decide alike."""
    for result in _ranks.run({"all": case}, 3, folder):
        assert result["all"] is None, result["all"]
    found, *others = (torch.load(folder / f"found-{rank}") for rank in range(3))
    for other in others:
        torch.testing.assert_close(found, other, rtol=0, atol=0)
    return found


def test_several_processes_train_and_resume_as_one_does(tmp_path, float64):
    for name in trained.RESUMED:
        trained.begin(name, Checkpoint(tmp_path / name))
    found = on_three(trained.on_ranks, tmp_path)
    wanted = {name: trained.train(name) for name in trained.OUTPUTS}
    for name in trained.OUTPUTS:
        close(found[name], wanted[name])
    for name in trained.RESUMED:
        close(found[f"{name} resumed"], wanted[name])
        close(trained.train(name, Checkpoint(tmp_path / f"{name}.ranks")), wanted[name])


@pytest.mark.slow
def test_several_processes_train_every_other_output_as_one_does(tmp_path, float64):
    found = on_three(trained.others_on_ranks, tmp_path)
    for name in trained.OTHERS:
        close(found[name], trained.train(name))
