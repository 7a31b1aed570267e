"""The search of a study: where it goes, where it ends, and what of it is done anew."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsphere.lab import study
from softsphere.lab.classification import RATES, Classification
from softsphere.lab.errors import LabError
from softsphere.lab.records import Record
from softsphere.lab.search import Axis, Space, search, widened
from softsphere.lab.spec import LossSpec
from softsphere.lab.training import Schedule

STUDY = Classification(
    dataset="digits",
    losses=(LossSpec.parse("softmax"), LossSpec.parse("spherical_softmax")),
    seeds=(0, 1),
    schedule=Schedule("mlp", 1, 128, "cpu"),
    rates=RATES,
    tune=True,
)


def walk(space: Space, height) -> tuple[list[dict], dict]:
    """All that a search tries, and its end."""
    tried: dict[tuple, tuple[float, ...]] = {}
    while True:
        waiting, best = search(space, lambda point: tried.get(tuple(point.values())))
        if best is not None:
            return [dict(zip(space.axes, point, strict=True)) for point in tried], best
        for point in waiting:
            assert tuple(point.values()) not in tried
            tried[tuple(point.values())] = (height(point),)


@given(st.lists(st.integers(0, 5), min_size=9, max_size=9), st.integers(0, 8))
def test_it_ends_where_no_neighbour_is_better(heights, start):
    axis = Axis(tuple(float(x) for x in range(9)), float(start))
    _, best = walk(Space({"x": axis}), lambda point: heights[int(point["x"])])
    place = int(best["x"])
    around = [heights[i] for i in (place - 1, place + 1) if 0 <= i < 9]
    assert all(heights[place] <= height for height in around)
    assert heights[place] <= heights[start]


def test_it_finds_the_bottom_of_a_valley_far_from_the_start_and_tries_little_on_the_way():
    axes = {name: Axis(tuple(range(-10, 11)), 0) for name in "xy"}
    tried, best = walk(Space(axes), lambda p: (p["x"] - 4) ** 2 + (p["y"] + 3) ** 2)
    assert best == {"x": 4, "y": -3}
    assert len(tried) <= 3 * 7 + 5


def test_of_equals_it_stays_where_it_is():
    tried, best = walk(Space({"x": Axis((1, 2, 3), 2)}), lambda _: 1.0)
    assert best == {"x": 2} and len(tried) == 3


def end(loss: str, setting: str, lr: float, seed: int, error: float) -> dict:
    final = {"best_epoch": 1, "valid_error": error, "mean_valid_error": error,
             "test_error": None if seed == study.TUNING_SEED else error, "test_nll": None,
             "seconds": 1.0, "diverged": False}  # fmt: skip
    return {"loss": loss, "setting": setting, "lr": lr, "seed": seed, "final": final}


def fill(record: Record, of: Classification, error) -> int:
    """Does all that is planned, with errors that are given. Returns how many runs that took."""
    count = 0
    while tasks := study.planned(of, record)[0]:
        task = tasks[0]
        name = study.TRIALS if task.trial else study.RUNS
        line = end(task.loss, task.setting, task.lr, task.seed, error(task))
        record.add(name, [line])
        count += 1
    return count


def away(task: study.Task) -> float:
    """Least at a rate of 0.03 and an ε of 10."""
    eps = dict(LossSpec.parse(task.setting).given).get("eps", 10.0)
    return abs(math.log(task.lr / 0.03)) + abs(math.log(eps / 10.0))


def test_every_loss_is_searched_alike_and_its_final_runs_have_what_was_found(tmp_path):
    record = Record.create(tmp_path / "r", STUDY.config())
    assert study.missing(STUDY, record) == {"softmax": 2, "spherical_softmax": 2}
    fill(record, STUDY, away)
    assert study.missing(STUDY, record) == {}
    finals = study.final_runs(Classification, record)
    assert [(line["setting"], line["lr"], line["seed"]) for line in finals] == [
        ("softmax", 0.03, 0),
        ("spherical_softmax:eps=10", 0.03, 0),
        ("softmax", 0.03, 1),
        ("spherical_softmax:eps=10", 0.03, 1),
    ]
    # both from the same rate, one step at a time
    trials = study.trial_runs(Classification, record)
    rates = [line["lr"] for line in trials if line["loss"] == "softmax"]
    assert rates == [0.001, 0.0003, 0.003, 0.01, 0.03, 0.1]


def test_a_final_run_with_another_choice_does_not_count(tmp_path):
    record = Record.create(tmp_path / "r", STUDY.config())
    record.add(study.RUNS, [end("softmax", "softmax", 0.1, 0, 0.5)])
    fill(record, STUDY, away)
    tasks, done = study.planned(STUDY, record)
    trials = study.trial_runs(Classification, record)
    assert tasks == [] and done == len(trials) + 4


def test_more_seeds_are_added_and_no_trial_is_done_again(tmp_path):
    record = Record.create(tmp_path / "r", STUDY.config())
    fill(record, STUDY, away)
    assert fill(record, replace(STUDY, seeds=(0, 1, 2)), away) == 2


def test_a_longer_axis_goes_on_with_the_search_and_the_new_choice_takes_the_place_of_the_old(
    tmp_path,
):
    short = replace(STUDY, rates=Axis((1e-3, 3e-3, 1e-2), 1e-3))
    record = Record.create(tmp_path / "r", short.config())
    fill(record, short, away)
    before = study.trial_runs(Classification, record)
    assert {line["lr"] for line in study.final_runs(Classification, record)} == {1e-2}

    long = replace(STUDY, rates=Axis((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-3))
    record = Record.reopen(tmp_path / "r", long.config(), long.grows)
    fill(record, long, away)
    trials = study.trial_runs(Classification, record)
    assert trials[: len(before)] == before
    assert {line["lr"] for line in trials[len(before) :]} == {3e-2, 1e-1}
    finals = study.final_runs(Classification, record)
    assert len(finals) == 4 and {line["lr"] for line in finals} == {3e-2}


def test_a_search_goes_on_only_where_each_axis_is_the_old_one_or_longer():
    def axes(values, start=2.0, name="x"):
        return Space({name: Axis(values, start), "y": Axis((1.0,), 1.0)}).config()

    old = axes((2.0, 3.0))
    assert widened(old, old)
    assert widened(old, axes((1.0, 2.0, 3.0, 4.0)))
    assert not widened(axes((1.0, 2.0, 3.0)), old)
    assert not widened(old, axes((2.0, 2.5, 3.0)))
    assert not widened(old, axes((2.0, 3.0), start=3.0))
    assert not widened(old, axes((2.0, 3.0), name="z"))
    assert not widened(old, {"x": old["x"]})
    # whatever a hand may have written there
    for broken in (None, [], {"x": 1, "y": old["y"]}, {"x": {"values": 3}, "y": old["y"]}):
        assert not widened(broken, old) and not widened(old, broken)


def test_a_record_of_another_search_is_refused(tmp_path):
    Record.create(tmp_path / "r", STUDY.config())
    other = replace(STUDY, rates=Axis((1e-3, 2e-3), 1e-3))
    with pytest.raises(
        LabError, match=r"search\.lr\.values = \[.*0\.001, .*, not \[0\.001, 0\.002\]"
    ):
        Record.reopen(tmp_path / "r", other.config(), other.grows)


def test_what_a_search_may_try_is_part_of_what_was_asked():
    asked = STUDY.config()["search"]
    assert asked["lr"] == {"values": list(RATES.values), "start": RATES.start}
    assert "spherical_softmax:eps" in asked
    assert set(replace(STUDY, tune=False).config()["search"]) == {"lr"}
