"""Runs whose steps are captured end as runs whose steps are not, by a stand-in for CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from _lab_runs import RUNS, Stopping, loaded
from _lab_studies import IMAGES, TEXT, untimed
from _recorded_graph import RecordedGraph, pretend_a_gpu
from softsphere_lab.experiments.on_images.image_sections import LOSSES
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.environment import EAGER
from softsphere_lab.study.protocol import Task
from softsphere_lab.training import capturing, run
from softsphere_lab.training.image_run import train
from softsphere_lab.training.language_run import LanguageRun

# What is trained as it is on a GPU too; `capturing` says why.
UNCAPTURED = (
    "adaptive_softmax",
    "an LSTM on streams of text, adaptive_softmax div_value=1.0",
    "clusters",
    "tied clusters",
    "items",
    "items and a factored layer",
)
GPU = "cuda"
CAPTURED = [case for case in RUNS if case not in UNCAPTURED]


class AsItIs:
    """Takes the steps that a CapturedStep would be given, one by one."""

    def __init__(self, step, optimizers, *examples):
        self.step = step

    def __call__(self, *inputs):
        return self.step(*inputs)


@pytest.fixture
def replays(monkeypatch):
    """Pretends a GPU, and counts the steps that are replayed."""
    pretend_a_gpu(monkeypatch)
    # a run is kept in the middle of its epochs, after the steps that warm up
    monkeypatch.setattr(run, "STEPS", 5)
    monkeypatch.setattr(run, "CAPTURED", 1)
    counted, replay = [], RecordedGraph.replay
    monkeypatch.setattr(RecordedGraph, "replay", lambda graph: counted.append(replay(graph)))
    return counted


def short(case):
    """A study of two epochs, the last batch of each smaller, and what is trained of it."""
    asked, name = RUNS[case]
    if isinstance(asked, type(IMAGES)):
        return replace(asked, schedule=replace(asked.schedule, epochs=2)), name
    if isinstance(asked, type(TEXT)):
        return replace(asked, setup=replace(asked.setup, epochs=2, train=1000, held=100)), name
    return asked, name


def trained(case, folder, kept, device="cpu"):
    asked, name = short(case)
    asked = asked.placed(device, None)
    task = Task(name, name, 3e-3, 0, trial=False)
    return untimed(asked.train(task, loaded(asked, folder), kept, lambda *_: None))


def text_run(name):
    """A run of a language model that is not trained yet."""
    asked, _ = short("softmax")
    return LanguageRun(asked.load().text, Output.parse(name), 3e-3, 0, asked.setup)


def check_same(one, two, tolerance):
    for x, y in zip(tree_leaves(one), tree_leaves(two), strict=True):
        assert x == (pytest.approx(y, rel=tolerance, abs=0.0) if isinstance(y, float) else y)


@pytest.mark.parametrize("case", CAPTURED)
def test_captured_steps_train_as_they_do_one_by_one(case, tmp_path, monkeypatch, replays):
    """With schedules, dropout, a smaller last batch, two epochs, and a stop within the first.

    All numbers are equal; those of a factored layer, which is inverted otherwise, nearly so.
    """
    tolerance = 1e-3 if "factored" in case else 0.0
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "CapturedStep", AsItIs)
        plain = trained(case, tmp_path, Checkpoint())
    assert not replays
    check_same(trained(case, tmp_path, Checkpoint()), plain, tolerance)
    assert replays
    kept = Stopping(tmp_path / "kept" / "run.pt")
    kept.saves = 1
    with pytest.raises(KeyboardInterrupt):
        trained(case, tmp_path, kept)
    torch.manual_seed(12345)
    replays.clear()
    check_same(trained(case, tmp_path, kept), plain, tolerance)
    assert replays


@pytest.mark.parametrize("case", UNCAPTURED)
def test_what_cannot_be_captured_is_not_tried(case, tmp_path, replays):
    trained(case, tmp_path, Checkpoint())
    assert not replays


@pytest.mark.parametrize("spec", LOSSES, ids=str)
def test_no_loss_on_outputs_reads_a_value(spec, monkeypatch, replays):
    asked = replace(IMAGES, schedule=replace(IMAGES.schedule, epochs=1))
    task, data = Task(str(spec), str(spec), 3e-3, 0, trial=True), asked.load()

    def ending():
        return untimed(asked.train(task, data, Checkpoint(), lambda *_: None))

    captured = ending()
    assert replays
    monkeypatch.setattr(capturing, "CapturedStep", AsItIs)
    assert captured == ending()


@pytest.mark.parametrize(
    "name", ["spherical_softmax", "squared_error", "softmax prior", "sampled_softmax"]
)
def test_no_other_layer_that_waits_for_a_gpu_reads_a_value(name, replays):
    one = text_run(name)
    one.epoch(lambda step: None)
    assert replays and len(one.history) == 1


def test_a_network_of_convolutions_reads_no_value(replays):
    data = IMAGES.load()
    schedule = replace(IMAGES.schedule, model="narrow_resnet", epochs=1, batch_size=300)
    train(data, LOSSES[1].loss(), 3e-3, 0, schedule, read_test=False)
    assert replays


def test_a_variable_of_the_environment_has_all_steps_taken_one_by_one(
    tmp_path, monkeypatch, replays
):
    """Rates are then numbers, which differ by rounding from those in float32 on a device."""
    captured = trained("softmax", tmp_path, Checkpoint())
    replays.clear()
    monkeypatch.setenv(EAGER, "1")
    check_same(trained("softmax", tmp_path, Checkpoint()), captured, 1e-4)
    assert not replays


def test_a_captured_run_is_kept_after_more_steps(monkeypatch, replays):
    """Otherwise writing its state would take longer than its steps."""
    monkeypatch.setattr(run, "CAPTURED", 3)
    monkeypatch.setattr(run, "STEPS", 2)
    monkeypatch.setattr(run, "FEWEST_STEPS", 4)
    kept, one = [], text_run("softmax")
    monkeypatch.setattr(one, "state", lambda: kept.append(one.rates[0].last_epoch))
    one.train(4, Checkpoint())
    # epochs of 8 steps: within each after 6, and after the second and the fourth as a whole
    assert kept == [6, 14, 16, 22, 30, 32]


def test_a_state_does_not_say_whether_steps_are_captured(monkeypatch, replays):
    """So that a run can be continued on another device. The rates are those of the schedule."""
    for name in ("softmax", "taylor_softmax factored rate=0.1"):
        one = text_run(name)
        one.epoch(lambda step: None)
        assert isinstance(one.optimizers[0].param_groups[0]["lr"], torch.Tensor)
        state = one.state()
        with monkeypatch.context() as patch:
            patch.setenv(EAGER, "1")
            other = text_run(name)
            other.resume(state)
            for optimizer, schedule in zip(other.optimizers, other.rates, strict=True):
                (group,) = optimizer.param_groups
                wanted = schedule.base_lrs[0] * other.rate(schedule.last_epoch)
                rates = [group["lr"], *schedule.get_last_lr()]
                assert rates == [wanted] * 2 and not any(map(torch.is_tensor, rates))
                assert not group["capturable"]
            other.epoch(lambda step: None)
        one.resume(state)
        assert all(group["capturable"] for each in one.optimizers for group in each.param_groups)


@pytest.mark.parametrize("eager", ["0", "1"])
def test_a_step_that_was_left_out_is_found_at_the_end_of_an_epoch_and_never_kept(
    eager, monkeypatch, replays
):
    monkeypatch.setenv(EAGER, eager)
    one = text_run("taylor_softmax factored rate=0.1")
    seen = []

    def after_step(step):
        watch = one.head.matrix.watch
        watch.period = 1000
        seen.append(step)
        if step >= 6:
            watch.refused.fill_(True)  # as by a step that could not be taken
        if step == 6:
            with pytest.raises(run.SingularStepError):
                one.state()

    one.epoch(after_step)
    assert bool(replays) == (eager == "0") and max(seen) == 8
    assert one.diverged and not one.history


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("case", CAPTURED)
def test_on_a_gpu_captured_steps_train_as_they_do_one_by_one(case, tmp_path, monkeypatch):
    """cuDNN's dropout between the layers of an LSTM is another each time."""
    made, kind = [], capturing.CapturedStep

    def note(*given):
        made.append(kind(*given))
        return made[-1]

    monkeypatch.setattr(capturing, "CapturedStep", note)
    (captured, _), _ = trained(case, tmp_path, Checkpoint(), GPU)
    assert made[0].captures
    monkeypatch.setenv(EAGER, "1")
    (plain, _), _ = trained(case, tmp_path, Checkpoint(), GPU)
    assert len(made) == 1
    tolerance = 0.1 if "dropout" in case else 1e-2
    assert captured["train_loss"] == pytest.approx(plain["train_loss"], rel=tolerance)
