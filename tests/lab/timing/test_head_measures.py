"""What is measured of heads, in this process and in one of its own."""

from __future__ import annotations

import pytest

from softsphere_lab.errors import LabError
from softsphere_lab.timing import head_measures as measures
from softsphere_lab.timing.clock import Effort
from softsphere_lab.timing.head_measures import OURS, head_measures
from softsphere_lab.timing.processes import measure_head
from softsphere_lab.timing.setting import Setting

SETTING = Setting(D=1000, d=64, m=128)
SHORT = Effort(0.0, 1, 1, 2)


@pytest.mark.parametrize("name", [*OURS, "softmax"])
def test_a_head_has_times_memory_and_the_error_of_its_own_loss(name):
    found = head_measures(name, SETTING, SHORT, "cpu")
    # bfloat16 keeps 8 bits; the gradient of another loss would be of another size altogether
    assert 1e-5 < found["error of the gradient by hidden"] < 2e-2
    assert found["milliseconds"] > 0 and found["milliseconds with AdamW"] > 0
    assert ("share of the product rate" in found) == (name == "gram")


def test_a_head_in_float32_has_the_error_of_float32():
    found = measure_head("gram", SETTING, SHORT, precision="highest")
    assert found["error of the gradient by hidden"] < 1e-5
    with pytest.raises(LabError, match="middling"):
        measure_head("gram", SETTING, SHORT, precision="middling")


def test_a_head_is_measured_in_a_process_that_says_why_it_failed():
    assert measure_head("softmax", SETTING, SHORT)["extra MiB"] > 0
    with pytest.raises(LabError, match=r"no head at D = 1,?000[\s\S]*KeyError: 'no head'"):
        measure_head("no head", SETTING, SHORT)


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
