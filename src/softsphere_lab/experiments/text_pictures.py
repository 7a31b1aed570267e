"""Pictures of the experiments on text, as pure functions of what a record has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from softsphere_lab.report.figures import distinguishable, save
from softsphere_lab.report.inference import interval
from softsphere_lab.report.measures import Metric, values
from softsphere_lab.report.paper import label
from softsphere_lab.report.results import Results
from softsphere_lab.training.language import perplexity

__all__ = ["Line", "curves", "lines", "over", "panels"]

# A curve: its name, x, y, and the ends of the intervals about y.
Line = tuple[str, Sequence[float], Sequence[float], Sequence[tuple[float, float]]]


def curves(results: Results, path: Path) -> None:
    """Validation perplexity by epoch and by seconds of training, means over the seeds.

    Of runs of one epoch by seconds alone.
    """
    import matplotlib.pyplot as plt

    names = [name for name in results.ends if any(by_epoch(results, name).values())]
    by_epochs = any(len(by_epoch(results, name)) > 1 for name in names)
    colours = dict(zip(names, distinguishable(len(names)), strict=True))
    height = 4.2 + 0.2 * math.ceil(len(names) / 3)
    figure, row = plt.subplots(
        1, 1 + by_epochs, figsize=(11, height), layout="constrained", sharey=True, squeeze=False
    )
    left, right = row[0][0], row[0][-1]
    for name in names:
        found = by_epoch(results, name)
        epochs = sorted(epoch for epoch, runs in found.items() if runs)
        mean = [perplexity(float(np.mean([nll for nll, _ in found[epoch]]))) for epoch in epochs]
        seconds = np.cumsum([np.mean([s for _, s in found[epoch]]) for epoch in epochs])
        style = {
            "color": colours[name],
            "linestyle": "--" if "lstm" in name.split() else "-",
            "marker": "o",
            "markersize": 4,
        }
        right.plot(seconds, drawable(mean), label=label(name), **style)
        if by_epochs:
            left.plot(epochs, drawable(mean), **style)
    if by_epochs:
        left.set(xlabel="epoch")
        left.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    right.set(xlabel="seconds of training", xscale="log")
    left.set(ylabel="validation perplexity")
    logarithmic(right)
    plain_numbers(left.yaxis)
    plain_numbers(right.xaxis)
    for axes in row[0]:
        tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    told = "how fast each output layer learns" if by_epochs else "what an epoch comes to and costs"
    figure.suptitle(f"{results.config['dataset']}: {told}", fontsize=12)
    save(figure, path)


def by_epoch(results: Results, name: str) -> dict[int, list[tuple[float, float]]]:
    """(negative log-likelihood, seconds) of each seed, by epoch; nothing without probabilities."""
    found: dict[int, list[tuple[float, float]]] = {}
    for line in results.epochs:
        if line["loss"] == name and line["valid_nll"] is not None:
            found.setdefault(line["epoch"], []).append((line["valid_nll"], line["seconds"]))
    return found


def over(name: str, runs: Mapping[int, Mapping[int, Any]], metric: Metric) -> Line:
    """Means of a metric and their intervals over x, of ends by x and seed.

    nan where all diverged.
    """
    x = sorted(runs)
    by_x = [list(values(runs[each], metric).values()) for each in x]
    known = [interval(some) for some in by_x]
    y = [mean for mean, _ in known]
    return name, x, y, [(mean - half, mean + half) for mean, half in known]


def panels(groups: dict[str, list[Line]], xlabel: str, ylabel: str, title: str, path: Path) -> None:
    """One picture a group, side by side, on one scale."""
    import matplotlib.pyplot as plt

    figure, row = plt.subplots(
        1, len(groups), figsize=(2 + 3.1 * len(groups), 4.2), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    names = list(dict.fromkeys(name for group in groups.values() for name, *_ in group))
    colours = dict(zip(names, distinguishable(len(names)), strict=True))
    for axes, (group, drawn) in zip(row[0], groups.items(), strict=True):
        for name, x, y, ends in drawn:
            draw(axes, name, x, y, ends, colours[name])
        axes.set(xlabel=xlabel, title=group)
        logarithmic(axes)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        plain_numbers(axes.yaxis)
        tidy(axes)
    row[0][0].set(ylabel=ylabel)
    row[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    save(figure, path)


def lines(drawn: Sequence[Line], xlabel: str, ylabel: str, title: str, path: Path) -> None:
    """Curves over the number of classes; a line at 1."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    axes.axhline(1, color="0.4", linewidth=1)
    for (name, x, y, ends), colour in zip(drawn, distinguishable(len(drawn)), strict=True):
        draw(axes, name, x, y, ends, colour)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
    if drawn:
        ticks = sorted({value for _, x, _, _ in drawn for value in x})
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=9)
    tidy(axes)
    axes.set_title(title, fontsize=12)
    save(figure, path)


def draw(
    axes: Axes,
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    ends: Sequence[tuple[float, float]],
    colour: object,
) -> None:
    """A curve with the intervals about its points."""
    below = [spread(value - low) for value, (low, _) in zip(y, ends, strict=True)]
    above = [spread(high - value) for value, (_, high) in zip(y, ends, strict=True)]
    axes.errorbar(
        x,
        drawable(y),
        yerr=[below, above],
        marker="o",
        markersize=5,
        capsize=3,
        color=colour,
        label=name,
    )


def plain_numbers(axis: mpl.axis.Axis) -> None:
    """Numbers as they are on a logarithmic axis, and no more than fit."""
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(mpl.ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))


def spread(length: float) -> float:
    """Of an interval's arm; none where there is no interval to give."""
    return length if math.isfinite(length) else 0.0


def drawable(values: Sequence[float]) -> list[float]:
    """What has no place in a picture left out: a gap."""
    return [value if math.isfinite(value) else math.nan for value in values]


def logarithmic(axes: Axes) -> None:
    """Heights on a logarithmic scale, where there are any."""
    if any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axes.get_lines()):
        axes.set_yscale("log")


def tidy(axes: Axes) -> None:
    """What all pictures have."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
