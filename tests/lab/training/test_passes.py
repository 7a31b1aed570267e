"""The time of a pass is that of its training alone."""

from __future__ import annotations

import pytest
import torch

from softsphere_lab.training import passes
from softsphere_lab.training.passes import Pass


def test_the_clock_is_read_at_the_ends_of_a_stretch_and_not_while_a_state_is_kept(monkeypatch):
    now, readings = 0.0, []

    def clock(device):
        readings.append(now)
        return now

    def take_step(index):
        nonlocal now
        now += 1.0
        return torch.ones(())

    def after_step(step):
        nonlocal now
        if step % 4 == 0 or step == 10:
            now += 100.0

    monkeypatch.setattr(passes, "_clock", clock)
    one = Pass.begin(torch.randperm(19), torch.device("cpu"))
    one.train(2, take_step, after_step, 4)
    assert one.seconds == 10.0 and one.loss == pytest.approx(1.0)
    # a GPU is waited for at each of them
    assert len(readings) == 7
