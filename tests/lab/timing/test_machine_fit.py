"""The numbers of a machine that follow from a table of times, and what they choose."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from softsphere.engines.dispatch import ENGINES
from softsphere.engines.engine import Workload
from softsphere.engines.machines import machine
from softsphere_lab.errors import LabError
from softsphere_lab.timing.machine_fit import choices, fitted

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PLACES = [("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)]
SIZES = list(product((16, 512, 4096), (1000, 50_000, 1_000_000), (64, 768, 4096)))
RATE, LEAST = 3e11, 2e-4


def made_times(device, dtype):
    """What all engines would take if their costs were the whole truth."""
    works = [Workload(m, D, d, 1, 0, dtype, device) for m, D, d in SIZES]
    return {
        work: {name: LEAST + engine.cost(work) / RATE for name, engine in ENGINES.items()}
        for work in works
    }


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_the_numbers_that_made_the_times_are_found(device, dtype):
    numbers = machine(device, dtype)
    found = fitted(made_times(device, dtype), numbers)
    for name in ("output", "input", "number", "overhead", "logits_limit", "float32"):
        assert getattr(found.machine, name) == pytest.approx(getattr(numbers, name), rel=1e-4)
    assert found.rate == pytest.approx(RATE, rel=1e-6)
    assert found.least == pytest.approx(LEAST, rel=1e-6)
    assert found.error < 1e-6


def test_choices_are_judged_by_the_times_of_what_they_choose():
    times = made_times("cuda", torch.bfloat16)
    numbers = replace(machine("cuda", torch.bfloat16), logits_limit=1 << 62)
    right = choices(times, numbers)
    assert right.mean == right.worst == 1
    # where outputs seem to be free, dense is taken too often
    wrong = choices(times, replace(numbers, output=0, overhead=1e18))
    taken = times[wrong.at]
    assert wrong.worst == taken["dense"] / min(taken.values()) > wrong.mean > 1
    only = {work: {"gram": taken["gram"]} for work, taken in times.items()}
    assert choices(only, numbers).worst == 1


def test_times_that_do_not_depend_on_the_sizes_are_refused():
    times = {work: dict.fromkeys(taken, 1.0) for work, taken in made_times(*PLACES[0]).items()}
    with pytest.raises(LabError, match="do not tell how long a FLOP takes; measure larger ones"):
        fitted(times, machine(*PLACES[0]))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("machine_numbers")


def test_the_committed_table_is_explained_by_numbers_that_choose_as_well(script, capsys):
    assert script.main([str(BENCHMARKS / "engines_by_size.csv")]) == 0
    said = capsys.readouterr().out
    assert "cpu, float32, 72 sizes" in said
    ratios = {
        line.split("│")[1].strip(): [float(x) for x in line.split("│")[9:11]]
        for line in said.splitlines()
        if "machines.py" in line or "fitted" in line
    }
    assert ratios.keys() == {"machines.py", "fitted"}
    assert all(1 <= mean <= worst < 1.1 for mean, worst in ratios.values())


def test_a_table_of_a_gpu_is_read_by_dtype(script):
    cells = {"D": "10", "d": "4", "m": "2", "measure": "seconds", "machine": "NVIDIA H200"}
    named = {"bfloat16: gram": "0.5", "float32: gram": "0.25", "float32: logits": "1"}
    rows = [{**cells, "layer": layer, "value": value} for layer, value in named.items()]
    found = script.times_of(rows)
    assert {place: list(times.values()) for place, times in found.items()} == {
        ("cuda", torch.bfloat16): [{"gram": 0.5}],
        ("cuda", torch.float32): [{"gram": 0.25}],
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no.csv", "cannot be read as a table of engines"),
        ("machine_numbers.py", "cannot be read as a table of engines"),
        ("factored_wear.csv", "has no seconds of dense, chunked, gram"),
    ],
)
def test_another_file_is_refused(script, name, said, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main([str(BENCHMARKS / name)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
