"""The picture of an experiment with items: quality against the time of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from softsphere_lab.report import canvas, point_names
from softsphere_lab.report.paper import label

__all__ = ["quality_over_seconds"]


def quality_over_seconds(
    points: Mapping[str, tuple[float, float]], ylabel: str, title: str, path: Path
) -> None:
    """Draws a point for each output layer, at its (seconds an epoch, quality)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours, beside = canvas.distinguishable(len(points)), []
    for (name, (seconds, quality)), colour in zip(points.items(), colours, strict=True):
        axes.plot(seconds, quality, color=colour, marker="o", linestyle="none")
        beside.append(point_names.Name(label(name), seconds, quality, colour))
    axes.set(xlabel="seconds an epoch", ylabel=ylabel)
    # names stand beside the outermost points too
    axes.margins(0.15)
    canvas.tidy(axes)
    figure.suptitle(title, fontsize=12)
    canvas.log_scale(axes, "x")
    point_names.place(axes, beside)
    canvas.save(figure, path)
