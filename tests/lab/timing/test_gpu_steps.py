"""Steps that are timed on a GPU, on a CPU: softmax in every way, and graphs by their stand-in."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from _recorded_graph import pretend_a_gpu
from softsphere_lab.timing import processes
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.gpu_steps import CAPTURED, ON_GPU, SOFTMAX_ON_GPU
from softsphere_lab.timing.processes import TRAINING_STEP
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.steps import Repeated
from softsphere_lab.timing.training_steps import LAYERS

SETTING = Setting(D=300, d=8, m=16)


@pytest.fixture(autouse=True)
def exact_products():
    """What softmax in TF32 allows is for its own process."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture
def compiled(monkeypatch):
    """How often a module was compiled, which is done without a C++ compiler."""
    counted, usual = [], torch.nn.Module.compile

    def compile(module, **options):
        counted.append(options)
        usual(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    return counted


@pytest.mark.parametrize("name", SOFTMAX_ON_GPU)
def test_softmax_takes_the_steps_of_softmax_in_every_way(name, compiled):
    torch.manual_seed(0)
    plain = LAYERS["softmax"](SETTING)
    torch.manual_seed(0)
    step = SOFTMAX_ON_GPU[name](SETTING)
    assert isinstance(step, Repeated) == ("captured" in name)
    assert len(compiled) == ("compiled" in name)
    # a product in bfloat16 rounds each of its numbers to 8 bits
    close = {"rtol": 2**-6, "atol": 2**-6} if "bfloat16" in name else {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        hidden, target = SETTING.batch(generator)
        wanted = plain(hidden, target)
        again = hidden.detach().requires_grad_()
        if isinstance(step, Repeated):
            loss, gradient = step(again, target)
        else:
            loss, gradient = step(again, target), again.grad
        torch.testing.assert_close(loss.float(), wanted, **close)
        torch.testing.assert_close(gradient, hidden.grad, **close)
    head = (step._step if isinstance(step, Repeated) else step).head
    assert head.weight.dtype == (torch.bfloat16 if "bfloat16" in name else torch.float32)
    torch.testing.assert_close(head.weight.float(), plain.head.weight, **close)


@pytest.mark.parametrize(
    "name", [CAPTURED, "softmax, bfloat16, captured", "softmax, TF32, captured"]
)
def test_steps_that_no_graph_took_are_counted(name, monkeypatch):
    pretend_a_gpu(monkeypatch)
    step = ON_GPU[name](SETTING)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        step(*SETTING.batch(generator))
    # three to warm up; the fourth is captured and replayed, unless a factored step was eliminated
    assert step.captures == 1 and step.eager[:3] == [True] * 3 and not any(step.eager[-2:])
    group = step._step.optimizer.param_groups[0]
    group["lr"] = group["lr"] / 2  # what the graph holds is another number, or in another place
    for _ in range(3):
        step(*SETTING.batch(generator))
    assert step.captures == 2 and step.eager[-3:] == [True, False, False]


def test_a_cpu_replays_nothing():
    step = ON_GPU[CAPTURED](SETTING)
    for _ in range(5):
        step(*SETTING.batch(torch.Generator().manual_seed(0)))
    assert step.captures == 0 and step.eager == [True] * 5


@pytest.mark.parametrize(("warm_up", "replayed"), [(0, 0.4), (1, 0.6), (3, 1.0)])
def test_the_share_is_of_the_steps_that_are_timed(warm_up, replayed, monkeypatch):
    pretend_a_gpu(monkeypatch)
    measured = partial(processes._step_measured, setting=SETTING)
    job = {"kind": TRAINING_STEP, "name": "softmax, TF32, captured", "device": "cpu"}
    effort = Effort(seconds=0, warm_up=warm_up, fewest=5)
    found = measured(job, effort=effort)
    assert (found.captures, found.replayed) == (1, replayed)
    assert found.extra_bytes is None
    plain = measured(job | {"name": "softmax"}, effort=effort)
    assert (plain.captures, plain.replayed) == (None, None)


def test_the_mean_is_of_all_timed_steps(monkeypatch):
    monkeypatch.setattr(processes, "step_times", lambda *_: [1.0, 2.0, 9.0])
    job = {"kind": TRAINING_STEP, "name": "softmax", "device": "cpu"}
    found = processes._step_measured(job, SETTING, Effort())
    assert (found.seconds, found.mean) == (2.0, 4.0)
