"""What is measured of heads, in this process and in one of its own."""

from __future__ import annotations

import pytest
import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing import head_measures as measures
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.head_measures import (
    BY_HIDDEN,
    BY_WEIGHT,
    CAPTURED,
    MEMORY,
    MILLISECONDS,
    OURS,
    SHARE,
    WITH_ADAMW,
    head_measures,
    measures_of,
)
from softsphere_lab.timing.processes import measure_head
from softsphere_lab.timing.setting import Setting

SETTING = Setting(D=1000, d=64, m=128)
SHORT = Effort(0.0, 1, 1, 2)


def test_what_matters_most_is_measured_first():
    always = (MILLISECONDS, MEMORY, BY_HIDDEN, BY_WEIGHT, WITH_ADAMW)
    assert measures_of("softmax", "cpu") == always
    assert measures_of("gram", "cuda") == (*always, SHARE, CAPTURED)


@pytest.mark.parametrize("name", [*OURS, "softmax"])
def test_a_head_has_times_memory_and_the_errors_of_its_own_loss(name):
    found = dict(head_measures(name, SETTING, SHORT, "cpu"))
    assert tuple(found) == measures_of(name, "cpu")
    # bfloat16 keeps 8 bits; the gradient of another loss would be of another size altogether
    assert 1e-5 < found[BY_HIDDEN] < 2e-2
    assert 1e-5 < found[BY_WEIGHT] < 2e-2
    assert found[MILLISECONDS] > 0 and found[WITH_ADAMW] > 0
    assert (SHARE in found) == (name == "gram")


def test_a_head_in_float32_has_the_errors_of_float32():
    found = dict(measure_head("gram", SETTING, SHORT, precision="highest"))
    assert found[BY_HIDDEN] < 1e-5 and found[BY_WEIGHT] < 1e-5
    with pytest.raises(LabError, match="middling"):
        list(measure_head("gram", SETTING, SHORT, precision="middling"))


def test_a_head_is_measured_in_a_process_that_says_why_it_failed():
    assert dict(measure_head("softmax", SETTING, SHORT))[MEMORY] > 0
    with pytest.raises(LabError, match=r"no head at D = 1,?000[\s\S]*KeyError: 'no head'"):
        list(measure_head("no head", SETTING, SHORT))


def test_a_measure_that_fails_is_left_out_and_the_others_stay(monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(measures.torch.optim, "AdamW", no_room)
    found = dict(head_measures("gram", SETTING, SHORT, "cpu"))
    assert found[WITH_ADAMW] == "OutOfMemoryError: CUDA out of memory."
    others = set(found) - {WITH_ADAMW}
    assert SHARE in others and all(isinstance(found[measure], float) for measure in others)


def test_numbers_are_there_before_the_next_is_measured(monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(measures._Head, "milliseconds_with_adamw", killed)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(found.measure for found in head_measures("softmax", SETTING, SHORT, "cpu"))
    assert seen == [MILLISECONDS, MEMORY, BY_HIDDEN, BY_WEIGHT]


def test_replays_of_a_captured_call_are_timed():
    replays = []

    def capture(call):
        return lambda: replays.append(call())

    for name in ("gram", "softmax"):
        replays.clear()
        found = dict(head_measures(name, SETTING, SHORT, "cpu", capture=capture))
        assert list(found)[-1] == CAPTURED and found[CAPTURED] > 0
        assert len(replays) == 1 + 2 * SHORT.fewest  # the gradients of the first are looked at


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_graph_that_computes_something_else_has_no_time(left):
    """One that launches nothing leaves the zeros that it finds."""

    def capture(call):
        head = call.__self__

        def replay():
            for leaf in (head.hidden, head.weight):
                leaf.grad += left

        return replay

    found = dict(head_measures("gram", SETTING, SHORT, "cpu", capture=capture))
    assert found[CAPTURED] == "RuntimeError: the graph computes another gradient than the call"


def test_a_call_that_cannot_be_captured_says_why():
    def capture(call):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nFor debugging")
        finally:  # as the end of a capture does
            raise RuntimeError("operation failed due to a previous error during capture")

    found = dict(head_measures("softmax", SETTING, SHORT, "cpu", capture=capture))
    assert found[CAPTURED] == "RuntimeError: operation not permitted when stream is capturing"
    assert found[MILLISECONDS] > 0 and found[WITH_ADAMW] > 0


def test_the_reason_of_a_failed_capture_outlives_what_fails_after_it(monkeypatch):
    """PyTorch may not be able to free memory then."""
    failed = []

    def capture(call):
        failed.append(True)
        raise RuntimeError("no capture")

    def forget(head):
        if failed:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(measures._Head, "forget", forget)
    found = []
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT"):
        found.extend(head_measures("softmax", SETTING, SHORT, "cpu", capture=capture))
    assert found[-1] == (CAPTURED, "RuntimeError: no capture")


def test_the_reason_is_that_of_the_error_and_not_of_what_was_tried_before():
    def raised(error):
        try:
            {}["k"]
        except KeyError:
            raise error  # noqa: B904

    for of_capture, told in ((False, "RuntimeError: no room"), (True, "KeyError: 'k'")):
        with pytest.raises(RuntimeError) as caught:
            raised(RuntimeError("no room"))
        assert measures._reason(caught.value, of_capture=of_capture) == told
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("the capture failed") from ValueError("the first")
    assert measures._reason(caught.value, of_capture=True) == "ValueError: the first"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("name", [*OURS, "softmax"])
def test_a_gpu_captures_a_head(name):
    found = dict(head_measures(name, SETTING, SHORT, "cuda"))
    assert tuple(found) == measures_of(name, "cuda")
    assert isinstance(found[CAPTURED], float), found[CAPTURED]


@pytest.mark.parametrize(("each", "steps"), [(0.01, 38), (0.5, 17), (5.0, 6)])
def test_long_steps_are_fewer(each, steps, monkeypatch):
    """Seconds count the warm-up too, so that a layer is measured and not given up."""
    now, taken = [0.0], []

    def seconds_of(run, device):
        taken.append(now[0])
        now[0] += each
        return each

    monkeypatch.setattr(measures, "seconds_of", seconds_of)
    monkeypatch.setattr(measures.time, "perf_counter", lambda: now[0])
    assert measures._median(lambda: None, Effort(8.0, 8, 3, 30), "cpu") == each
    assert len(taken) == steps
