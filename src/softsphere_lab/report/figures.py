"""Pictures, as pure functions of a record."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from softsphere_lab.records.folder import write_bytes
from softsphere_lab.report.summary import Row

__all__ = ["comparison", "side_by_side"]

mpl.use("Agg")

# More names than these cover the curves.
MOST_INSIDE = 6


def distinguishable(count: int) -> list[Any]:
    """Colours that are all different."""
    for name in ("tab10", "tab20"):
        colours = mpl.colormaps[name](range(mpl.colormaps[name].N))
        if count <= len(colours):
            return list(colours[:count])
    return list(mpl.colormaps["turbo"](np.linspace(0, 1, count)))


def comparison(
    lines: list[dict[str, Any]],
    rows: list[Row],
    title: str,
    path: Path,
    named: Callable[[Row], str] = lambda row: row.setting,
    reported: Mapping[str, float] | None = None,
) -> None:
    """Learning curves (mean and range over seeds) beside the final errors of every seed.

    named: what a loss is called. reported: errors in per cent to stand beside those of some losses.
    """
    import matplotlib.pyplot as plt

    epochs = [line for line in lines if "epoch" in line]
    finals = [line for line in lines if "final" in line]
    colours = dict(zip([row.loss for row in rows], distinguishable(len(rows)), strict=True))
    crowded = len(rows) > MOST_INSIDE
    size = (11, 4.2 if not crowded else 2.6 + 0.28 * len(rows))
    figure, (curves, points) = plt.subplots(1, 2, figsize=size, layout="constrained")

    for row in rows:
        # by seed: one that was cut off and done again counts once
        by_epoch: dict[int, dict[int, float]] = {}
        for line in epochs:
            if line["loss"] == row.loss:
                by_epoch.setdefault(line["epoch"], {})[line["seed"]] = 100 * line["valid_error"]
        x = sorted(by_epoch)
        errors = [list(by_epoch[e].values()) for e in x]
        mean = [np.mean(each) for each in errors]
        curves.plot(x, mean, color=colours[row.loss], label=named(row), linewidth=1.8)
        curves.fill_between(
            x,
            [min(each) for each in errors],
            [max(each) for each in errors],
            color=colours[row.loss],
            alpha=0.12,
            linewidth=0,
        )
    # an error of zero has no place on a logarithmic axis
    scale = "log" if epochs and all(line["valid_error"] > 0 for line in epochs) else "linear"
    curves.set(xlabel="epoch", ylabel="validation error, %", yscale=scale)
    curves.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    curves.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
    curves.tick_params(axis="y", which="minor", labelsize=8)
    curves.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    if crowded:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    else:
        curves.legend(frameon=False, fontsize=9)
    curves.grid(alpha=0.25)

    for place, row in enumerate(reversed(rows)):
        own = [line["final"] for line in finals if line["loss"] == row.loss]
        values = [100 * final["test_error"] for final in own if not final["diverged"]]
        shift = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else [0.0]
        points.scatter(values, place + np.asarray(shift), s=16, color=colours[row.loss], alpha=0.5)
        points.errorbar(
            row.error,
            place,
            xerr=None if np.isnan(row.error_half) else row.error_half,
            fmt="D",
            color=colours[row.loss],
            markersize=6,
            capsize=4,
        )
    others = {
        place: reported[row.loss]
        for place, row in enumerate(reversed(rows))
        if reported and row.loss in reported
    }
    if others:
        points.scatter(
            list(others.values()),
            list(others),
            s=60,
            marker="x",
            color="black",
            label="paper",
        )
        points.legend(frameon=False, fontsize=9)
    points.set_yticks(range(len(rows)), [named(row) for row in reversed(rows)])
    points.set(xlabel="test error, %  (seeds; mean and 95 % interval)")
    points.grid(axis="x", alpha=0.25)
    for axes in (curves, points):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    save(figure, path)


def side_by_side(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    """Validation loss by epoch of each engine, one upon the other, and the time of a step."""
    import matplotlib.pyplot as plt

    figure, (curves, bars) = plt.subplots(
        1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=(3, 2)
    )
    engines = list(dict.fromkeys(line["engine"] for line in lines))
    for place, engine in enumerate(engines):
        own = [line for line in lines if line["engine"] == engine and "epoch" in line]
        # each is narrower and dashed otherwise, so that the one before can be seen under it
        width = 6 * 0.6**place
        style = (
            {"linewidth": width, "alpha": 0.5}
            if not place
            else {"lw": width, "ls": (0, (4, place))}
        )
        curves.plot(
            [line["epoch"] for line in own],
            [line["valid_loss"] for line in own],
            marker="o",
            label=engine,
            **style,
        )
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
    curves.legend(frameon=False)
    bars.set_yticks(range(len(engines)), engines)
    bars.invert_yaxis()
    bars.set(xlabel="milliseconds a whole step")
    bars.margins(x=0.2)
    for axes in (curves, bars):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a picture whole, and closes it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    plt.close(figure)
    write_bytes(path, buffer.getvalue())
