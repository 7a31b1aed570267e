"""Pictures of the experiments on text, as pure functions of what a record has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softsphere_lab.records.folder import Line
from softsphere_lab.report import canvas, point_names
from softsphere_lab.report.inference import interval
from softsphere_lab.report.measures import Metric, values
from softsphere_lab.report.paper import label
from softsphere_lab.report.results import Results
from softsphere_lab.training.text_parts import perplexity

if TYPE_CHECKING:  # they take long to import
    from matplotlib.axes import Axes

__all__ = ["Curve", "curve_over", "learning_curves", "panels", "ratios_over"]

# Intervals about the points of several curves at one x stand this far apart, as a share of x.
APART = 0.02
# The most letters of a name in a legend of three columns.
LONG = 45


@dataclass(frozen=True)
class Curve:
    """A curve with the ends of the intervals about its points.

    y is NaN where all runs diverged. lost: the number of runs that diverged and that were done, by
    x, where some but not all diverged.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ends: Sequence[tuple[float, float]]
    lost: Mapping[float, tuple[int, int]]


def curve_over(name: str, runs: Mapping[int, Mapping[int, Line]], metric: Metric) -> Curve:
    """Returns the means of a metric and their intervals over x. runs: the ends, by x and seed."""
    x = sorted(runs)
    known = [interval(list(values(runs[each], metric).values())) for each in x]
    lost: dict[float, tuple[int, int]] = {}
    for each in x:
        diverged = sum(line["final"]["diverged"] for line in runs[each].values())
        if 0 < diverged < len(runs[each]):
            lost[each] = diverged, len(runs[each])
    ends = [(mean - half, mean + half) for mean, half in known]
    return Curve(name, x, [mean for mean, _ in known], ends, lost)


def learning_curves(results: Results, path: Path) -> None:
    """Draws the validation perplexity by epoch and by seconds of training, means over the seeds.

    Runs of one epoch are points over the seconds, with their names beside them.
    """
    names = [name for name in results.ends if any(_by_epoch(results, name).values())]
    note = _not_drawn(results, names)
    title = str(results.config["dataset"])
    if any(len(_by_epoch(results, name)) > 1 for name in names):
        _over_epochs_and_seconds(results, names, note, f"{title}: how fast each layer learns", path)
    else:
        _after_one_epoch(results, names, note, f"{title}: what one epoch costs and yields", path)


def _over_epochs_and_seconds(
    results: Results, names: Sequence[str], note: str, title: str, path: Path
) -> None:
    import matplotlib.pyplot as plt

    columns = 3 if max(len(_with_diverged(results, name)) for name in names) <= LONG else 2
    height = 4.4 + 0.2 * math.ceil(len(names) / columns)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), layout="constrained", sharey=True
    )
    shapes = zip(names, canvas.distinguishable(len(names)), canvas.markers(len(names)), strict=True)
    for name, colour, marker in shapes:
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": "--" if "lstm" in name.split() else "-",
            "marker": marker,
            "markersize": 4.5,
        }
        epochs, seconds, mean = _learned(results, name)
        left.plot(epochs, mean, **style)
        right.plot(seconds, mean, label=_with_diverged(results, name), **style)
    left.set(xlabel="epoch", ylabel="validation perplexity")
    canvas.integers(left.xaxis)
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        canvas.tidy(axes)
    canvas.legend_below(figure, columns, note)
    figure.suptitle(title, fontsize=12)
    canvas.log_scale(left, "y")
    canvas.log_scale(right, "x")
    canvas.save(figure, path)


def _after_one_epoch(
    results: Results, names: Sequence[str], note: str, title: str, path: Path
) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    beside = []
    for name, colour in zip(names, canvas.distinguishable(len(names)), strict=True):
        _, seconds, mean = _learned(results, name)
        axes.plot(seconds, mean, color=colour, marker="o", linestyle="none")
        if math.isfinite(mean[-1]):
            beside.append(
                point_names.Name(_with_diverged(results, name), seconds[-1], mean[-1], colour)
            )
    axes.set(xlabel="seconds of training", ylabel="validation perplexity")
    # names stand beside the outermost points too
    axes.margins(0.12)
    canvas.tidy(axes)
    canvas.caption(figure, note)
    figure.suptitle(title, fontsize=12)
    canvas.log_scale(axes, "x")
    canvas.log_scale(axes, "y")
    point_names.place(axes, beside)
    canvas.save(figure, path)


def _learned(results: Results, name: str) -> tuple[list[int], list[float], list[float]]:
    """The epochs, the seconds until each, and the perplexity of the mean log-likelihood there."""
    found = _by_epoch(results, name)
    epochs = sorted(found)
    mean = [perplexity(float(np.mean([nll for nll, _ in found[epoch]]))) for epoch in epochs]
    seconds = np.cumsum([np.mean([taken for _, taken in found[epoch]]) for epoch in epochs])
    return epochs, seconds.tolist(), canvas.drawable(mean)


def _by_epoch(results: Results, name: str) -> dict[int, list[tuple[float, float]]]:
    """(negative log-likelihood, seconds) of each seed by epoch, of layers with probabilities."""
    found: dict[int, list[tuple[float, float]]] = {}
    for line in results.epochs:
        if line["loss"] == name and line["valid_nll"] is not None:
            found.setdefault(line["epoch"], []).append((line["valid_nll"], line["seconds"]))
    return found


def _with_diverged(results: Results, name: str) -> str:
    """The name of a layer, with its runs that diverged before their end."""
    runs = results.ends[name].values()
    diverged = sum(line["final"]["diverged"] for line in runs)
    return label(name) + (f" ({diverged} of {len(runs)} diverged)" if diverged else "")


def _not_drawn(results: Results, names: Sequence[str]) -> str:
    """Says which layers have no curve, and why."""
    reasons: dict[str, list[str]] = {}
    for name, runs in results.ends.items():
        if name not in names:
            lost = all(line["final"]["diverged"] for line in runs.values())
            reason = "since all runs diverged" if lost else "since they have no likelihood"
            reasons.setdefault(reason, []).append(label(name))
    parts = [f"{reason}: {'; '.join(found)}" for reason, found in reasons.items()]
    return f"Not shown, {'. Not shown, '.join(parts)}." if parts else ""


def panels(
    groups: Mapping[str, Sequence[Curve]], xlabel: str, ylabel: str, title: str, path: Path
) -> None:
    """Draws a panel for each group, side by side on one scale.

    A cross at the upper edge stands where all runs diverged; a caption counts them where some did.
    """
    import matplotlib.pyplot as plt

    size = (2 + 3.1 * len(groups), 4.6)
    figure, (row,) = plt.subplots(
        1, len(groups), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(curve.name for group in groups.values() for curve in group))
    colours = dict(zip(names, canvas.distinguishable(len(names)), strict=True))
    lost = False
    for axes, (group, drawn) in zip(row, groups.items(), strict=True):
        for place, curve in enumerate(drawn):
            apart = 2 * APART * (place - (len(drawn) - 1) / 2)
            x = [value + apart for value in curve.x]
            _draw(axes, curve, x, colours[curve.name])
            pairs = zip(curve.x, curve.y, strict=True)
            # as crosses are wide
            gone = [at + 3 * apart for at, y in pairs if not math.isfinite(y)]
            lost |= bool(gone)
            axes.plot(
                gone,
                [0.97] * len(gone),
                "x",
                color=colours[curve.name],
                markersize=8,
                markeredgewidth=2,
                transform=axes.get_xaxis_transform(),
            )
        axes.set(xlabel=xlabel, title=group)
        canvas.integers(axes.xaxis)
        canvas.tidy(axes)
    row[0].set(ylabel=ylabel)
    handles, entries = row[0].get_legend_handles_labels()
    if lost:
        (cross,) = row[0].plot([], [], "x", color="0.3", markersize=8, markeredgewidth=2)
        handles, entries = [*handles, cross], [*entries, "all runs diverged"]
    canvas.legend_below(
        figure, len(entries), _some_lost(groups, xlabel), handles=handles, labels=entries
    )
    figure.suptitle(title, fontsize=12)
    canvas.log_scale(row[0], "y")
    canvas.save(figure, path)


def _some_lost(groups: Mapping[str, Sequence[Curve]], xlabel: str) -> str:
    """Says of which means some of the runs are missing."""
    parts = [
        f"{curve.name}, {group}, {at:g} {xlabel} ({diverged} of {runs})"
        for group, drawn in groups.items()
        for curve in drawn
        for at, (diverged, runs) in curve.lost.items()
    ]
    return f"Means are without the runs that diverged: {'; '.join(parts)}." if parts else ""


def ratios_over(drawn: Sequence[Curve], xlabel: str, ylabel: str, title: str, path: Path) -> None:
    """Draws curves of ratios over numbers, on a scale of their logarithms, and a line at 1."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.axhline(1, color="0.4", linewidth=1)
    for place, (curve, colour) in enumerate(
        zip(drawn, canvas.distinguishable(len(drawn)), strict=True)
    ):
        apart = 1 + APART * 2 * (place - (len(drawn) - 1) / 2)
        _draw(axes, curve, [value * apart for value in curve.x], colour)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
    if drawn:
        ticks = sorted({value for curve in drawn for value in curve.x})
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
        longest = max(len(curve.name) for curve in drawn)
        canvas.legend_below(figure, 3 if longest <= 33 else 2 if longest <= LONG else 1)
    canvas.tidy(axes)
    axes.set_title(title, fontsize=12)
    canvas.save(figure, path)


def _draw(axes: Axes, curve: Curve, x: Sequence[float], colour: Any) -> None:
    """A curve with the intervals about its points. x: where they stand, a little apart."""
    pairs = list(zip(curve.y, curve.ends, strict=True))
    below = [_arm(value - low) for value, (low, _) in pairs]
    above = [_arm(high - value) for value, (_, high) in pairs]
    axes.errorbar(
        x,
        canvas.drawable(curve.y),
        yerr=[below, above],
        marker="o",
        markersize=4.5,
        capsize=3,
        color=colour,
        label=curve.name,
    )


def _arm(length: float) -> float:
    """The length of an interval's arm; 0 where there is no interval."""
    return length if math.isfinite(length) else 0.0
