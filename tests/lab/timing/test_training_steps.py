"""Every output layer that is timed trains; a new one joins by its line in LAYERS."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from softsphere.matrix import step as factored_step
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


def test_a_step_of_sampled_softmax_touches_targets_and_negatives_alone():
    setting = Setting(D=5000, d=4, m=3)
    step = LAYERS["sampled softmax, 1024"](setting)
    hidden, target = setting.batch(torch.Generator().manual_seed(0))
    before = step.head.weight.detach().clone()
    step(hidden, target)
    assert step.head.weight.grad.is_sparse
    moved = (step.head.weight != before).any(1).nonzero().squeeze(1)
    assert 900 < len(moved) <= 1024 + 3
    assert set(target.tolist()) <= set(moved.tolist())


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


@pytest.mark.parametrize(
    "setting",
    [
        Setting(D=500, d=64, m=25),
        Setting(D=500, d=64, m=47),
        Setting(D=500, d=64, m=64),
        Setting(D=500, d=16, m=512),
    ],
    ids=str,
)
def test_a_factored_step_has_its_products_and_no_other(setting, monkeypatch):
    """With few rows and with many, whose products are others. The inverse has its own."""
    step, multiply = layers.factored(setting), layers.products(setting)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step(*setting.batch(generator))
    inverse, spent = factored_step._inverse, []

    def counted(run, *given):
        with FlopCounterMode(display=False) as counter:
            result = run(*given)
        spent.append(counter.get_total_flops())
        return result

    monkeypatch.setattr(factored_step, "_inverse", lambda *given: counted(inverse, *given))
    counted(multiply, *setting.batch(generator))
    counted(step, *setting.batch(generator))
    of_products, of_inverse, of_step = spent
    # and at most a few products of a vector
    assert 0 <= of_step - of_inverse - of_products <= 8 * setting.m * setting.d
