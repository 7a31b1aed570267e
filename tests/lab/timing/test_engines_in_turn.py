"""The engines at one size: which are timed, and what is said of them."""

from __future__ import annotations

import pytest
import torch

from softsphere_lab.timing import engines_in_turn
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


def test_an_engine_without_memory_is_left_out_and_the_others_are_timed(monkeypatch):
    def out_of_memory():
        def loss(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30 GiB")

        return loss

    losses = {**engines_in_turn.LOSSES, "dense": out_of_memory}
    monkeypatch.setattr(engines_in_turn, "LOSSES", losses)
    rows = list(compared(TINY, PLACE))
    left = [row for row in rows if row.measure == "left out"]
    assert [(row.layer, row.value) for row in left] == [
        ("dense", "CUDA out of memory. Tried to allocate 30 GiB")
    ]
    assert {row.layer for row in rows if row.measure == "seconds"} == {
        "logits", "chunked", "gram", "auto"
    }  # fmt: skip
