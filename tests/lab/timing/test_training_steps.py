"""Every output layer that is timed trains; a new one joins by its line in LAYERS."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from softsphere_lab.timing import training_steps as layers
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import CORE, FACTORED, GRAM, LAYERS, obstacle

SETTING = Setting(D=2500, d=16, m=8)


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_changes_the_parameters_and_lowers_the_loss(name):
    if name == CORE and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no fused softmax")
    torch.manual_seed(0)
    step = LAYERS[name](SETTING)
    hidden, target = SETTING.batch(torch.Generator().manual_seed(0))

    def loss() -> float:
        # the same negatives, for the layer that draws them
        torch.manual_seed(1)
        return float(step(hidden, target).detach())

    before = copy.deepcopy(step.head.state_dict())
    first = loss()
    after = step.head.state_dict()
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    assert hidden.grad is not None and hidden.grad.any()
    for _ in range(20):
        loss()
    assert loss() < first


def test_gram_takes_the_steps_of_factored():
    ours, gram = LAYERS[FACTORED](SETTING), LAYERS[GRAM](SETTING)
    with torch.no_grad():
        gram.head.weight.copy_(ours.head.to_linear().weight)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        batch = SETTING.batch(generator)
        torch.testing.assert_close(ours(*batch), gram(*batch))
    torch.testing.assert_close(ours.head.to_linear().weight, gram.head.weight, atol=1e-5, rtol=1e-4)


def test_sampled_softmax_is_that_of_targets_and_draws_over_their_expected_counts():
    setting, negatives = Setting(D=50, d=4, m=3), 20
    head = layers.SampledSoftmax(setting, negatives)
    hidden, target = setting.batch(torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    got = head(hidden, target)
    torch.manual_seed(1)
    drawn = [math.floor(51**u) - 1 for u in torch.rand(negatives).tolist()]
    assert set(drawn) & set(target.tolist())  # some are the target of a row, which counts once

    def over_its_count(row: int, k: int) -> float:
        count = negatives * math.log((k + 2) / (k + 1)) / math.log(51)
        return math.exp(float(hidden[row] @ head.weight[k])) / count

    loss = 0.0
    with torch.no_grad():
        for row, t in enumerate(target.tolist()):
            own = over_its_count(row, t)
            others = sum(over_its_count(row, k) for k in drawn if k != t)
            loss -= math.log(own / (own + others)) / setting.m
    assert math.isclose(float(got.detach()), loss, rel_tol=1e-5)


def test_targets_are_common_ones_more_often():
    _, target = Setting(10_000, 2, 20_000).batch(torch.Generator().manual_seed(0))
    assert int(target.min()) >= 0 and int(target.max()) < 10_000
    # P(t < 99) = log 100 / log 10,001
    assert abs(float((target < 99).double().mean()) - 0.5) < 0.02


def test_what_the_machine_cannot_do_is_said(monkeypatch):
    assert obstacle("softmax", SETTING) is None
    huge = Setting(10**12, 128, 128)
    possible = [
        name for name in LAYERS if name != CORE or hasattr(layers.F, "linear_cross_entropy")
    ]
    assert all("GB" in obstacle(name, huge) for name in possible)
    monkeypatch.delattr(layers.F, "linear_cross_entropy", raising=False)
    assert "F.linear_cross_entropy" in obstacle(CORE, SETTING)
