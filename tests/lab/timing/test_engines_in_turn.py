"""The engines at one size: which are timed, and what is said of them."""

from __future__ import annotations

import pytest
import torch

from softsphere_lab.timing import engines_in_turn, failures
from softsphere_lab.timing.benchmark import Case, Row, read_table, run
from softsphere_lab.timing.engines_in_turn import Place, compared
from softsphere_lab.timing.setting import Setting

PLACE = Place("cpu", torch.float32, memory=14e9, seconds=0, fewest=1, most=2)
TINY = Setting(D=50, d=8, m=16)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        (TINY, {"dense", "logits", "chunked", "gram", "auto"}),
        # gram has a hundredth of the FLOPs
        (Setting(D=1_000_000, d=64, m=4096), {"gram", "auto"}),
        # a single row, for which the outputs are few
        (Setting(D=1_000_000, d=768, m=1), {"dense", "logits", "chunked", "auto"}),
        # the outputs and the weight would not fit
        (Setting(D=2_000_000, d=768, m=512), {"chunked", "gram", "auto"}),
    ],
)
def test_those_are_timed_that_fit_and_may_win(setting, names):
    assert set(PLACE.contestants(setting)) == names


def test_the_rows_say_what_was_chosen_and_what_was_best():
    rows = {(row.layer, row.measure): row.value for row in compared(TINY, PLACE, "float32: ")}
    seconds = {layer: value for (layer, measure), value in rows.items() if measure == "seconds"}
    assert seconds.keys() == {f"float32: {name}" for name in PLACE.contestants(TINY)}
    engines = {name: seconds[f"float32: {name}"] for name in ("dense", "chunked", "gram")}
    assert rows["float32: best", "is"] == min(engines, key=engines.__getitem__)
    assert rows["float32: auto", "is"] == "dense"
    ratio = rows["float32: auto", "times the best engine"]
    assert ratio == pytest.approx(seconds["float32: auto"] / min(engines.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_weight_have_the_dtype_of_the_place(monkeypatch, dtype):
    seen = set()

    def loss(hidden, weight, target):
        seen.add((hidden.dtype, weight.dtype))
        return (hidden @ weight.T).sum()

    monkeypatch.setattr(
        engines_in_turn, "LOSSES", dict.fromkeys(engines_in_turn.LOSSES, lambda: loss)
    )
    place = Place("cpu", dtype, memory=14e9, seconds=0, fewest=1, most=1)
    assert list(compared(TINY, place))
    assert seen == {(dtype, dtype)}


def raising(monkeypatch, name: str, error: Exception, calls: int = 0):
    """The losses, of which one raises an error once it was called so often."""
    usual, seen = engines_in_turn.LOSSES[name], []

    def made():
        loss = usual()

        def broken(*given):
            seen.append(name)
            if len(seen) > calls:
                raise error
            return loss(*given)

        return broken

    losses = {**engines_in_turn.LOSSES, name: made}
    monkeypatch.setattr(engines_in_turn, "LOSSES", losses)


class KernelError(Exception):
    """As those of Triton, which are no RuntimeError."""


@pytest.mark.parametrize("calls", [0, 1, 2], ids=["first", "warm-up", "timed"])
@pytest.mark.parametrize("name", ["dense", "logits", "auto"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("no room"), "OutOfMemoryError: no room"),
        (RuntimeError("no such kernel\nHelp: ask"), "RuntimeError: no such kernel"),
        (KernelError(), "KernelError"),
    ],
    ids=["memory", "kernel", "triton"],
)
def test_an_engine_that_raises_is_left_out_and_the_others_are_timed(
    monkeypatch, error, told, name, calls
):
    raising(monkeypatch, name, error, calls)
    rows = list(compared(TINY, PLACE, "x: "))
    left = [(row.layer, row.value) for row in rows if row.measure == "left out"]
    assert left == [(f"x: {name}", told)]
    others = {f"x: {other}" for other in PLACE.contestants(TINY) if other != name}
    assert {row.layer for row in rows if row.measure == "seconds"} == others
    measures = {row.measure for row in rows}
    assert ("times the best engine" in measures) == (name != "auto")
    assert ("times plain logits" in measures) == (name == "dense")


def test_a_size_at_which_every_engine_raises_has_no_best_one(monkeypatch):
    for name in PLACE.contestants(TINY):
        raising(monkeypatch, name, RuntimeError("no"))
    rows = list(compared(TINY, PLACE))
    assert [row.measure for row in rows] == ["left out"] * 5 + ["is"]


@pytest.mark.parametrize("name", ["gram", "auto"])
def test_an_error_of_cuda_after_which_the_device_computes_leaves_out_one_engine(monkeypatch, name):
    raising(monkeypatch, name, RuntimeError("CUDA error: misaligned address"))
    rows = list(compared(TINY, PLACE))
    assert [row.layer for row in rows if row.measure == "left out"] == [name]
    others = {other for other in PLACE.contestants(TINY) if other != name}
    assert {row.layer for row in rows if row.measure == "seconds"} == others


LOST = [
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered\nCompile with"),
]
if hasattr(torch, "AcceleratorError"):
    LOST.append(torch.AcceleratorError("CUDA error: unknown error"))


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_device_ends_the_process_and_the_case_is_passed_by_the_next(
    monkeypatch, error, tmp_path, capsys
):
    def listed(_):
        first = Case("first", lambda: compared(TINY, PLACE))
        return [first, Case("second", lambda: [Row("a", TINY, "is", "measured")])]

    folder = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        raising(patch, "gram", error, calls=1)
        patch.setattr(failures, "_computes", lambda device: False)
        assert run("x.py", "", listed, arguments=["--out", folder]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("x.py: error: first: the device is lost") and "--resume" in said
    first = [(row["layer"], row["measure"]) for row in read_table(tmp_path / "run/table.csv")]
    assert first == [("gram", "left out")]
    assert run("x.py", "", listed, arguments=["--out", folder, "--resume"]) == 0
    rows = read_table(tmp_path / "run/table.csv")
    assert [(row["layer"], row["measure"]) for row in rows] == [*first, ("a", "is")]
    assert rows[0]["value"].startswith(type(error).__name__)
