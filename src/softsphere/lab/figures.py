"""Pictures, as pure functions of a record."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from softsphere.lab.records import write_bytes
from softsphere.lab.summary import Row

__all__ = ["comparison"]

mpl.use("Agg")


def comparison(lines: list[dict[str, Any]], rows: list[Row], title: str, path: Path) -> None:
    """Learning curves (mean and range over seeds) beside the final errors of every seed."""
    import matplotlib.pyplot as plt

    epochs = [line for line in lines if "epoch" in line]
    finals = [line for line in lines if "final" in line]
    colours = dict(
        zip(
            [row.loss for row in rows],
            plt.rcParams["axes.prop_cycle"].by_key()["color"] * 2,
            strict=False,
        )
    )
    figure, (curves, points) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    for row in rows:
        by_epoch: dict[int, list[float]] = {}
        for line in epochs:
            if line["loss"] == row.loss:
                by_epoch.setdefault(line["epoch"], []).append(100 * line["valid_error"])
        x = sorted(by_epoch)
        mean = [np.mean(by_epoch[e]) for e in x]
        curves.plot(x, mean, color=colours[row.loss], label=row.loss, linewidth=1.8)
        curves.fill_between(
            x,
            [min(by_epoch[e]) for e in x],
            [max(by_epoch[e]) for e in x],
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
    curves.legend(frameon=False, fontsize=9)
    curves.grid(alpha=0.25)

    for place, row in enumerate(reversed(rows)):
        values = [100 * line["final"]["test_error"] for line in finals if line["loss"] == row.loss]
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
    points.set_yticks(range(len(rows)), [row.setting for row in reversed(rows)])
    points.set(xlabel="test error, %  (seeds; mean and 95 % interval)")
    points.grid(axis="x", alpha=0.25)
    for axes in (curves, points):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    plt.close(figure)
    write_bytes(path, buffer.getvalue())
