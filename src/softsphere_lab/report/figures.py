"""Pictures of training runs: losses compared on images, and engines side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softsphere_lab.report import canvas
from softsphere_lab.report.learning_curves import curves_of
from softsphere_lab.report.summary import Row

if TYPE_CHECKING:  # they take long to import
    from matplotlib.axes import Axes

__all__ = ["comparison", "side_by_side"]

# The ranges over the seeds of more losses than these hide each other.
MOST_RANGES = 4
# Heights in a loss's row of its seeds and of the paper's number; the mean is in the middle.
SEEDS_BELOW, PAPER_ABOVE = 0.24, 0.3


def comparison(
    lines: list[dict[str, Any]],
    rows: list[Row],
    title: str,
    path: Path,
    named: Callable[[Row], str] = lambda row: row.setting,
    reported: Mapping[str, float] | None = None,
) -> None:
    """Draws learning curves (means over the seeds) beside the final errors of every seed.

    named: what a loss is called. reported: the paper's errors in per cent, by loss.
    """
    import matplotlib.pyplot as plt

    size = (11, 3.4 + 0.34 * len(rows))
    figure, (curves, points) = plt.subplots(1, 2, figsize=size, layout="constrained")
    colours = dict(zip([row.loss for row in rows], canvas.distinguishable(len(rows)), strict=True))
    _learning_curves(curves, lines, rows, colours, named)
    _final_errors(points, lines, rows, colours, named, reported or {})
    for axes in (curves, points):
        canvas.tidy(axes)
    figure.suptitle(title, fontsize=12)
    handles, names = curves.get_legend_handles_labels()
    others, other_names = points.get_legend_handles_labels()
    canvas.legend_below(figure, 4, handles=[*handles, *others], labels=[*names, *other_names])
    # an error of zero has no place on a logarithmic axis
    canvas.log_scale(curves, "y")
    canvas.save(figure, path)


def _learning_curves(
    axes: Axes,
    lines: list[dict[str, Any]],
    rows: list[Row],
    colours: Mapping[str, Any],
    named: Callable[[Row], str],
) -> None:
    """Validation errors by epoch: means over the seeds, and for few losses their ranges."""
    markers = canvas.markers(len(rows))
    for row, curve, marker in zip(rows, curves_of(lines, rows), markers, strict=True):
        x, means = list(curve.means), list(curve.means.values())
        style = {"color": colours[row.loss], "marker": marker, "markersize": 3.5}
        axes.plot(x, means, label=named(row), linewidth=1.6, **style)
        if len(rows) <= MOST_RANGES:
            low, high = list(curve.lows.values()), list(curve.highs.values())
            axes.fill_between(x, low, high, color=colours[row.loss], alpha=0.1, linewidth=0)
    ranges = "mean and range over the seeds" if len(rows) <= MOST_RANGES else "mean over the seeds"
    axes.set(xlabel="epoch", ylabel=f"validation error, %\n({ranges})")
    canvas.integers(axes.xaxis)


def _final_errors(
    axes: Axes,
    lines: list[dict[str, Any]],
    rows: list[Row],
    colours: Mapping[str, Any],
    named: Callable[[Row], str],
    reported: Mapping[str, float],
) -> None:
    """A row for each loss: mean and interval, its seeds below it, the paper's number above."""
    places = {row.loss: place for place, row in enumerate(reversed(rows))}
    for row in rows:
        place, colour = places[row.loss], colours[row.loss]
        finals = [x["final"] for x in lines if "final" in x and x["loss"] == row.loss]
        values = [100 * final["test_error"] for final in finals if not final["diverged"]]
        axes.scatter(values, _side_by_side_heights(values, place), s=14, color=colour, alpha=0.6)
        half = None if math.isnan(row.error_half) else row.error_half
        axes.errorbar(row.error, place, xerr=half, fmt="D", color=colour, markersize=5.5, capsize=4)
    known = {loss: reported[loss] for loss in places if loss in reported}
    if known:
        heights = [places[loss] + PAPER_ABOVE for loss in known]
        axes.scatter(
            list(known.values()), heights, s=36, marker="x", color="black", label="paper's number"
        )
    told = [_with_diverged(row, named(row)) for row in rows]
    axes.set_yticks([places[row.loss] for row in rows], told)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set(xlabel="test error, %  (mean and 95 % interval; the seeds below)")


def _side_by_side_heights(values: Sequence[float], place: float) -> list[float]:
    """Heights below a row's middle at which equal values do not cover each other."""
    step, seen, heights = 0.06, dict[float, int](), []
    for value in values:
        count = seen[round(value, 3)] = seen.get(round(value, 3), 0) + 1
        # 0, 1, −1, 2, −2 steps from the height of the seeds
        heights.append(place - SEEDS_BELOW + step * (count // 2) * (-1 if count % 2 else 1))
    return heights


def _with_diverged(row: Row, name: str) -> str:
    """The name of a loss, with its runs that diverged, which no mean has."""
    if not row.diverged:
        return name
    many = "all" if row.diverged == row.seeds else f"{row.diverged} of {row.seeds}"
    return f"{name}\n({many} runs diverged)"


def side_by_side(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws the validation loss by epoch of each engine, and the time of a step.

    The curves lie upon each other, so each is narrower than the one below it.
    """
    import matplotlib.pyplot as plt

    figure, (curves, bars) = plt.subplots(
        1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=(3, 2)
    )
    engines = list(dict.fromkeys(line["engine"] for line in lines))
    names = []
    for place, engine in enumerate(engines):
        own = [line for line in lines if line["engine"] == engine and "epoch" in line]
        style: dict[str, Any] = {"linewidth": 6 * 0.6**place, "markersize": 13 * 0.65**place}
        style |= {"linestyle": (0, (4, place))} if place else {"alpha": 0.5}
        losses = [line["valid_loss"] for line in own]
        curves.plot([line["epoch"] for line in own], losses, marker="o", label=engine, **style)
        diverged = any(line["final"].get("diverged") for line in lines
                       if line["engine"] == engine and "final" in line)  # fmt: skip
        names.append(f"{engine}\n(diverged)" if diverged else engine)
        if own:
            milliseconds = 1000 * np.mean([line["step_seconds"] for line in own])
            drawn = bars.barh(place, milliseconds, color=f"C{place}", height=0.5)
            bars.bar_label(drawn, fmt=" %.1f ms", fontsize=9)
    curves.set(xlabel="epoch", ylabel="validation loss")
    # differences in the last digits are not to fill the picture
    low, high = curves.get_ylim()
    room = max(0.0, 0.01 * high - (high - low)) / 2
    curves.set_ylim(low - room, high + room)
    curves.ticklabel_format(useOffset=False)
    curves.set_xticks(sorted({line["epoch"] for line in lines if "epoch" in line}))
    bars.set_yticks(range(len(engines)), names)
    bars.invert_yaxis()
    bars.set(xlabel="milliseconds of a whole step")
    bars.margins(x=0.25)
    for axes in (curves, bars):
        canvas.tidy(axes)
    figure.suptitle(title, fontsize=11)
    canvas.legend_below(figure, len(engines), handles=curves.get_lines())
    canvas.save(figure, path)
