"""Step times against D: a plan is measured, gone on with, and told of in words and a picture."""

from __future__ import annotations

import pytest
from matplotlib.text import Text

from softsphere_lab.experiments.on_engines import scaling
from softsphere_lab.experiments.on_engines.scaling import (
    METRICS,
    PLANS,
    Plan,
    finding,
    left_out,
    markdown,
)
from softsphere_lab.records.folder import Record
from softsphere_lab.report import canvas
from softsphere_lab.timing import processes as timing
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.training_steps import FACTORED, LAYERS

PLAN = Plan((Setting(10, 4, 4), Setting(20, 4, 4)), (FACTORED, "softmax"), 0.1)


def line(layer: str, D: int, seconds: float) -> dict[str, object]:
    return {"layer": layer, "D": D, "d": 128, "m": 128, "seconds": seconds}


LINES = [
    line(FACTORED, 100, 0.002),
    line("softmax", 100, 0.005),
    line("sampled", 100, 0.001),
    line("adaptive", 100, 0.0019),
    line("gram", 100, 0.001),
    line(FACTORED, 1000, 0.003),
    line("softmax", 1000, 1.5),
    line("sampled", 1000, 0.0015),
    line("adaptive", 1000, 0.0031),
    line(FACTORED, 10_000, 0.004),
    line("sampled", 10_000, 0.002),
    line("adaptive", 10_000, 0.0041),
    line("gram", 10_000, 0.04),
]


@pytest.fixture
def counted(monkeypatch) -> list[tuple[str, int]]:
    """What was timed, in the order it was."""
    timed: list[tuple[str, int]] = []

    def measure(name, setting, effort):
        assert effort.seconds == PLAN.seconds
        timed.append((name, setting.D))
        return timing.Measured(1e-3 * len(timed), None, 1.0)

    monkeypatch.setattr(timing, "measure", measure)
    return timed


def test_a_plan_is_measured_and_told_in_words_a_table_and_a_picture(tmp_path, counted):
    """Real steps are timed by the test that runs every experiment at its smallest budget."""
    record = Record.create(tmp_path / "run", PLAN.config())
    said: list[str] = []
    scaling.measure(PLAN, record, said.append)
    lines = record.lines(METRICS)
    assert len(lines) == len(said) == len(counted) == len(PLAN.settings) * len(PLAN.layers)
    assert "10 to 20 classes" in finding(lines)
    assert markdown(lines).count("\n") == 2 + len(PLAN.layers)
    scaling.picture(lines, [], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_going_on_does_only_what_is_missing(tmp_path, counted, monkeypatch):
    folder = tmp_path / "run"
    record = Record.create(folder, PLAN.config())
    measure = timing.measure

    def killed(name, setting, effort):
        if len(counted) == 2:
            raise KeyboardInterrupt
        return measure(name, setting, effort)

    monkeypatch.setattr(timing, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        scaling.measure(PLAN, record, lambda said: None)
    assert [line["seconds"] for line in record.lines(METRICS)] == [1e-3, 2e-3]

    monkeypatch.setattr(timing, "measure", measure)
    said: list[str] = []
    scaling.measure(PLAN, Record.reopen(folder, PLAN.config(), ()), said.append)
    assert counted == [(name, D) for D in (10, 20) for name in PLAN.layers]
    assert said == [f"{FACTORED}, D = 20: 3 ms a step", "softmax, D = 20: 4 ms a step"]
    assert [line["seconds"] for line in record.lines(METRICS)] == [1e-3, 2e-3, 3e-3, 4e-3]
    scaling.measure(PLAN, record, said.append)
    assert len(counted) == 4


def test_a_layer_with_an_obstacle_is_left_out_and_said(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(
        scaling, "obstacle", lambda name, _: "it is too large" if name == "softmax" else None
    )
    record = Record.create(tmp_path / "run", PLAN.config())
    said: list[str] = []
    scaling.measure(PLAN, record, said.append)
    assert counted == [(FACTORED, 10), (FACTORED, 20)]
    assert said[1] == "softmax, D = 10: left out, it is too large"
    assert "softmax" not in markdown(record.lines(METRICS))


def test_the_budgets():
    assert list(PLANS) == ["smoke", "small", "full"]
    assert [s.D for s in PLANS["full"].settings] == [10**4, 10**5, 10**6, 10**7]
    assert all(set(plan.layers) <= set(LAYERS) for plan in PLANS.values())
    assert PLANS["full"].layers == tuple(LAYERS)


def test_the_table_has_times_of_the_factored_layer_in_brackets():
    table = [row.strip("| ").split(" | ") for row in markdown(LINES).splitlines()]
    assert table[0] == [
        "milliseconds a step (times the factored layer's)",
        "D = 100",
        "D = 1,000",
        "D = 10,000",
    ]
    assert table[2] == [FACTORED, "2", "3", "4"]
    assert table[3] == ["softmax", "5 (2.5)", "1,500 (500)", "–"]
    assert table[6] == ["gram", "1 (0.5)", "–", "40 (10)"]


def test_a_table_without_the_factored_layer_has_no_brackets():
    assert "| softmax | 5 |" in markdown(LINES[1:2])
    assert finding(LINES[1:2]) == "The factored layer has not been measured."


def test_the_finding_is_what_the_lines_say():
    assert finding(LINES) == (
        "From 100 to 10,000 classes a step of the factored layer went from 2 to 4 ms (2.00 times). "
        "Slower than it: softmax at every D (up to 500 times); gram at D = 10,000 (up to 10 "
        "times). Faster: sampled at every D (up to 2 times); gram at D = 100 (up to 2 times). "
        "As fast, within a tenth: adaptive."
    )


def test_names_beside_the_lines_do_not_cover_each_other(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(canvas, "save", lambda picture, path: drawn.append(picture))
    close = [line(f"layer {i} (ours)", D, 0.001 + 1e-6 * i) for i in range(8) for D in (10, 10_000)]
    scaling.picture([*LINES, *close], [], tmp_path / "unused.png")
    (picture,) = drawn
    picture.draw_without_rendering()
    # of the words alone: their box has the line to the curve's end besides
    boxes = [Text.get_window_extent(text) for text in picture.axes[0].texts]
    assert len(boxes) == 12
    # of the one that ends before the others do
    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == ["softmax"]
    width, height = picture.get_size_inches() * picture.dpi
    for i, box in enumerate(boxes):
        assert box.x1 <= width and box.y1 <= height and box.y0 >= 0
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_what_a_machine_could_not_time_is_told_from_the_record_alone(tmp_path, monkeypatch):
    plan = PLANS["smoke"]
    config = {"experiment": "scaling", "budget": "smoke", **plan.config()}
    record = Record.create(tmp_path / "r", config)
    few = plan.layers[0]
    monkeypatch.setattr(scaling, "obstacle", lambda name, _: None if name == few else "no memory")
    monkeypatch.setattr(timing, "measure", lambda *_: timing.Measured(0.001, None, 0.001))
    scaling.measure(plan, record, lambda _: None)
    scaling.measure(plan, record, lambda _: None)
    assert len(record.lines("left_out.jsonl")) == len(left_out(record)) == 4
    # another machine has other obstacles
    monkeypatch.setattr(scaling, "obstacle", lambda *_: None)
    assert scaling.EXPERIMENT.unfinished(record) == ""
    (record.folder / METRICS).unlink()
    assert scaling.EXPERIMENT.unfinished(record).startswith(f"not measured: {few} at D = 1,000")
