"""Every picture of a record can be read: numbers, names and curves do not cover each other."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from softsphere_lab.experiments.earlier import record_at
from softsphere_lab.experiments.page import report_of
from softsphere_lab.report import canvas, figures, point_names
from softsphere_lab.report.paper import label
from softsphere_lab.report.plateau import draw_plateaus, plateau_of
from softsphere_lab.report.results import Results
from softsphere_lab.report.summary import summarise

RECORDS = Path(__file__).parents[3] / "records"
FOLDERS = sorted(path.parent.name for path in RECORDS.glob("*/config.json"))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a picture, and returns its figure in place of a file."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))

    def draw(draw_to):
        draw_to(tmp_path / "picture.png")
        figure = found.pop()
        figure.draw_without_rendering()
        return figure

    return draw


def pictures_of(folder):
    section = report_of(record_at(RECORDS / folder)).section
    assert section.pictures
    return section.pictures.items()


def shown(texts):
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def numbers(axes):
    """The numbers at the ticks of both axes that are within their limits."""
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        low, high = sorted(limits)
        ticks = [
            tick.label1
            for minor in (False, True)
            for tick in (axis.get_minor_ticks() if minor else axis.get_major_ticks())
            if low <= tick.get_loc() <= high
        ]
        yield axis, shown(ticks)


def boxes_of(texts):
    # the words alone: the box of an annotation has its line besides
    return [Text.get_window_extent(text) for text in texts]


def legends(figure):
    return [*figure.legends, *(axes.legend_ for axes in figure.axes if axes.legend_)]


def check(figure):
    """Fails where a reader of the picture would be at a loss."""
    whole = figure.bbox
    for axes in figure.axes:
        ticks = [text for _, texts in numbers(axes) for text in texts]
        for one, other in itertools.combinations(boxes_of(ticks), 2):
            assert not one.overlaps(other), "numbers collide"
        for axis, texts in numbers(axes):
            shared = axis is axes.yaxis and not texts and len(figure.axes) > 1
            few = axis.get_scale() == "log" and len(texts) < 3
            assert shared or not few, "an axis says too little"
        names = boxes_of(shown(axes.texts))
        for i, box in enumerate(names):
            assert whole.contains(box.x0, box.y0) and whole.contains(box.x1, box.y1)
            assert not any(box.overlaps(other) for other in names[:i]), "names collide"
            for line in axes.get_lines():
                if line.get_linestyle() == "None":
                    continue
                curve = line.get_path().transformed(line.get_transform())
                assert not curve.intersects_bbox(box, filled=False), "a name lies on a curve"
            points, at = point_names.obstacles(axes)[1], box
            assert not any(at.overlaps(point) for point in points), "a name lies on a point"
        for line in axes.get_lines():
            curve = line.get_path().transformed(line.get_transform())
            for name in axes.texts:
                if arrow := getattr(name, "arrow_patch", None):
                    leader = arrow.get_path().transformed(arrow.get_transform())
                    assert not leader.intersects_path(curve, filled=False), "a line is crossed"
    for legend in legends(figure):
        box = legend.get_window_extent()
        for axes in figure.axes:
            assert not box.overlaps(axes.get_tightbbox()), "a legend covers axes"
        assert whole.contains(box.x0, box.y0) and whole.contains(box.x1, box.y1)


def words(figure):
    """All that is written in a picture."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_covers_anything_else(folder, drawn):
    for _, draw in pictures_of(folder):
        check(drawn(draw))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_layer_of_a_record_is_drawn_or_said_to_be_missing(folder, drawn):
    record = record_at(RECORDS / folder)
    if folder.endswith("scaling"):
        names = {line["layer"] for line in record.lines("metrics.jsonl")}
        names |= {line["layer"] for line in record.lines("left_out.jsonl")}
    else:
        experiment = report_of(record).experiment
        results = Results.of_record(type(experiment.studies["full"]), record)
        # depth, activation and classes are axes of their own
        names = {
            label(" ".join(word for word in name.split() if "=" not in word or ":" in word))
            for name in results.ends
        }
    if folder.endswith("classes-small"):
        names.remove("softmax")  # all the others are given in multiples of it
    for picture, draw in pictures_of(folder):
        if picture == "sweep":  # it is over clusters alone, in multiples of softmax
            continue
        said = words(drawn(draw))
        assert all(name in said for name in names)


def test_what_was_not_measured_or_has_diverged_is_said(drawn):
    found = {folder.split("-", 3)[-1]: folder for folder in FOLDERS}
    said = words(drawn(dict(pictures_of(found["scaling"]))["steps"]))
    assert "Not measured at D = 10,000,000, since it takes 20 GB" in said
    figure = drawn(dict(pictures_of(found["ablation-small"]))["networks"])
    assert "without the runs that diverged: softmax, exp, 3 hidden layers (1 of 3)" in words(figure)
    crosses = [
        line.get_color()
        for line in figure.axes[1].get_lines()
        if line.get_marker() == "x" and len(line.get_xdata())
    ]
    # log-Taylor and log-spherical softmax, which all diverged there
    assert len(set(crosses)) == 2
    assert "Not shown, since they have no likelihood: Z-loss; squared error." in words(
        drawn(dict(pictures_of(found["wikipedia-small"]))["curves"])
    )


def ends(loss, errors, diverged=0):
    return [
        {
            "loss": loss, "seed": seed, "setting": loss, "lr": 0.1,
            "final": {"test_error": error, "test_nll": None, "seconds": 1.0,
                      "diverged": seed < diverged},
        }
        for seed, error in enumerate(errors)
    ]  # fmt: skip


def compared(drawn, lines, **options):
    rows = summarise(Results.of_lines({}, lines))
    return rows, drawn(lambda path: figures.comparison(lines, rows, "title", path, **options))


def test_each_mean_stands_beside_the_name_of_its_loss(drawn):
    lines = [*ends("softmax", [0.1] * 3), *ends("z_loss", [0.2] * 3), *ends("bohning", [0.3] * 3)]
    rows, figure = compared(drawn, lines)
    points = figure.axes[1]
    heights = {tick.label1.get_text(): tick.get_loc() for tick in points.yaxis.get_major_ticks()}
    means = {
        round(float(line.get_xdata()[0]), 6): float(line.get_ydata()[0])
        for line in points.get_lines()
        if line.get_marker() == "D"
    }
    assert {row.setting: means[round(row.error, 6)] for row in rows} == heights


def test_diverged_runs_are_counted_and_equal_seeds_are_all_seen(drawn):
    lines = [*ends("softmax", [0.1] * 10, 3), *ends("z_loss", [0.2] * 2, 2)]
    lines += [
        {"loss": "softmax", "seed": 5, "epoch": epoch, "valid_error": 0.5 / epoch}
        for epoch in (1, 2, 3)
    ]
    _, figure = compared(drawn, lines, reported={"softmax": 10.0})
    check(figure)
    said = words(figure)
    assert "softmax\n(3 of 10 runs diverged)" in said and "z_loss\n(all runs diverged)" in said
    seeds = figure.axes[1].collections[0].get_offsets().tolist()
    assert len(seeds) == 7 and len({tuple(point) for point in seeds}) == 7


def test_plateaus_of_rates_can_be_read(drawn):
    rates = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)
    layers = {
        f"log-Taylor softmax, base measure, layer {i}": plateau_of(
            {rate: 100.0 + 40 * abs(place - i) for place, rate in enumerate(rates)}
        )
        for i in range(5)
    }
    layers["diverges"] = plateau_of({0.1: 5.0, 1.0: 5.1, 10.0: float("inf")})
    figure = drawn(lambda path: draw_plateaus({"AdamW": layers, "FactoredSGD / D": layers}, path))
    check(figure)
    assert all(name in words(figure) for name in layers)


@pytest.mark.parametrize("ratio", [1.02, 1.3, 2, 7, 30, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("which", ["x", "y"])
def test_numbers_on_a_logarithmic_axis_never_collide(drawn, which, ratio):
    def draw(path):
        figure = mpl.figure.Figure(figsize=(4, 3), layout="constrained")
        axes = figure.subplots()
        ends, flat = [3.7, 3.7 * ratio], [1, 2]
        axes.plot(*((ends, flat) if which == "x" else (flat, ends)), "o")
        canvas.log_scale(axes, which)
        figure.savefig(path)

    figure = drawn(draw)
    check(figure)
    along = dict(zip("xy", numbers(figure.axes[0]), strict=True))[which][1]
    assert len(along) >= 3


def test_names_of_points_close_together_find_places(drawn):
    def draw(path):
        figure = mpl.figure.Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        points = [(x / 10, y / 10) for x in range(3) for y in range(3)]
        axes.plot([0, 1], [0.5, 0.5])
        axes.plot(*zip(*points, strict=True), "o")
        axes.set(xlim=(-1, 1.2), ylim=(-0.5, 0.7))
        named = [point_names.Name(f"name {i}", x, y, "C0") for i, (x, y) in enumerate(points)]
        point_names.place(axes, named)
        figure.savefig(path)

    check(drawn(draw))
