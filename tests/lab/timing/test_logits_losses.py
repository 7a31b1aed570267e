"""The criteria on logits: what a table of a GPU has, made on a CPU, and what stays as it was."""

from __future__ import annotations

import argparse
import importlib
from functools import partial
from pathlib import Path

import pytest
import torch

from softsphere_lab.errors import LabError
from softsphere_lab.timing import benchmark
from softsphere_lab.timing.benchmark import read_table
from softsphere_lab.timing.setting import Setting

FOLDER = Path(__file__).parents[3] / "benchmarks"
SETTING = Setting(D=50, d=0, m=4)


@pytest.fixture
def script(monkeypatch):
    """The benchmark, which compiles without a C++ compiler."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    return importlib.import_module("logits_losses_vs_cross_entropy")


def options(script, *given):
    parser = argparse.ArgumentParser()
    script.add_options(parser)
    return argparse.Namespace(
        **vars(parser.parse_args(given)), smoke=False, record=False, minutes=None
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_each_loss_is_timed_as_it_is_and_compiled(script, dtype):
    rows = list(script.compared_on_gpu(SETTING, 3, "cpu", dtype))
    names = [*script.CRITERIA, *(f"{name}, compiled" for name in script.CRITERIA)]
    found = {(row.layer, row.measure): row.value for row in rows}
    measures = {
        "milliseconds",
        "time over F.cross_entropy",
        "time over the faster F.cross_entropy",
        "extra memory over logits",
    }
    assert {*found} == {(f"{dtype}: {name}", measure) for name in names for measure in measures}
    both = [f"{dtype}: F.cross_entropy", f"{dtype}: F.cross_entropy, compiled"]
    assert found[both[0], "time over F.cross_entropy"] == 1
    faster = min(both, key=lambda name: found[name, "milliseconds"])
    assert found[faster, "time over the faster F.cross_entropy"] == 1


def test_the_logits_have_the_dtype_of_the_case_and_compiled_losses_are_the_losses(script):
    for dtype in script.DTYPES.values():
        contest = script.Contest(SETTING, script.CRITERIA, "cpu", dtype)
        assert contest.logits.dtype == dtype
        for criterion in script.CRITERIA.values():
            mine, same = (
                each(contest.logits, contest.target)
                for each in (script.compiled(criterion), criterion)
            )
            torch.testing.assert_close(mine, same)


def test_a_criterion_that_raises_is_left_out(script, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setitem(script.CRITERIA, script.REFERENCE, broken)
    rows = list(script.compared_on_gpu(SETTING, 1, "cpu", "float32"))
    left = [row for row in rows if row.measure == "left out"]
    names = [script.REFERENCE, script.COMPILED]
    assert [row.layer for row in left] == [f"float32: {name}" for name in names]
    assert left[0].value == "RuntimeError: no kernel"
    timed = {row.layer for row in rows if row.measure == "milliseconds"}
    assert len(timed) == 2 * (len(script.CRITERIA) - 1)
    assert not any("time over" in row.measure for row in rows)


def test_a_gpu_has_three_sizes_in_two_dtypes_and_a_cpu_one_in_float32(script, monkeypatch):
    (case,) = script.cases(options(script))
    assert case.name == "D = 50,257, d = 0, m = 4096"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LabError, match="--device cuda is a CUDA device"):
        script.cases(options(script, "--device", "cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = [case.name for case in script.cases(options(script, "--device", "cuda"))]
    assert len(set(names)) == 6 and "bfloat16, D = 256,000, d = 0, m = 4096" in names
    one = options(script, "--device", "cuda", "--classes", "128256")
    assert [case.name for case in script.cases(one)] == [
        f"{dtype}, D = 128,256, d = 0, m = 4096" for dtype in script.DTYPES
    ]


def test_a_table_is_of_the_device_that_the_options_name(script, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "gpu_name", lambda device: {"cpu": None}.get(device, "a GPU"))
    monkeypatch.setattr("softsphere_lab.records.environment.gpu_name", lambda device: None)

    def made(*given):
        return benchmark.run(
            script.__file__, "", lambda _: script.cases(options(script, "--rows", "4", "--classes",
            "50")), script.add_options, [*given, "--out", str(tmp_path / given[-1])],
        )  # fmt: skip

    assert made("--device", "cuda:0") == made("--device", "cpu") == 0
    (there,) = {row["machine"] for row in read_table(tmp_path / "cuda:0" / "table.csv")}
    (here,) = {row["machine"] for row in read_table(tmp_path / "cpu" / "table.csv")}
    assert there == "a GPU" and here != there
