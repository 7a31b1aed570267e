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


def test_two_processes_train_and_resume_as_one_does(tmp_path, float64):
    for name in trained.RESUMED:
        trained.begin(name, Checkpoint(tmp_path / name))
    for result in _ranks.run({"all": trained.on_ranks}, 2, tmp_path):
        assert result["all"] is None, result["all"]
    found, other = (torch.load(tmp_path / f"found-{rank}") for rank in range(2))
    for name in trained.OUTPUTS:
        close(found[name], trained.train(name))
    for name in trained.RESUMED:
        wanted = trained.train(name)
        close(found[f"{name} resumed"], wanted)
        close(trained.train(name, Checkpoint(tmp_path / f"{name}.ranks")), wanted)
    # all ranks have the same numbers, by which they decide alike
    torch.testing.assert_close(found, other, rtol=0, atol=0)
