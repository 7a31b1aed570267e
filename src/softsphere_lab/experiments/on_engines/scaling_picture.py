"""The picture of step times against the number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softsphere_lab.report import canvas, point_names

if TYPE_CHECKING:  # they take long to import
    from matplotlib.axes import Axes

__all__ = ["draw_step_times"]

# Where names beside the axes begin, as a share of the axes' width.
BESIDE = 1.04


def draw_step_times(
    times: Mapping[str, Mapping[int, float]],
    left_out: Mapping[str, Sequence[str]],
    title: str,
    path: Path,
) -> None:
    """Draws milliseconds against D, both logarithmic, with a name at the end of each line.

    times: seconds by layer and D. left_out: layers that were not timed, by where and why.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    ends, curves = [], {}
    for name, own in times.items():
        taken = [1e3 * seconds for seconds in own.values()]
        ours = name.endswith("(ours)")
        (curves[name],) = axes.plot(
            list(own), taken, marker="o", linewidth=2.6 if ours else 1.4, zorder=3 if ours else 2
        )
        ends.append(point_names.Name(name, max(own), taken[-1], curves[name].get_color()))
    axes.set(xscale="log", xlabel="classes D", ylabel="milliseconds of a training step")
    axes.set_xticks(sorted({D for own in times.values() for D in own}), minor=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.minorticks_off()
    axes.set_title(title, fontsize=11)
    canvas.tidy(axes)
    told = [f"Not measured {why}: {'; '.join(names)}." for why, names in left_out.items()]
    most = max((D for own in times.values() for D in own), default=0)
    # a line from a name to where a curve ends early would cross others
    early = [name.text for name in ends if name.x < most]
    if early:
        handles = [curves[name] for name in early]
        canvas.legend_below(figure, 3, "\n".join(told), handles=handles, labels=early)
    else:
        canvas.caption(figure, "\n".join(told))
    _beside_the_axes(axes, [name for name in ends if name.x == most])
    canvas.log_scale(axes, "y")
    canvas.save(figure, path)


def _beside_the_axes(axes: Axes, names: Sequence[point_names.Name]) -> None:
    """Writes names right of the axes, moved apart, with a dotted line to where each curve ends."""
    axes.set(yscale="log")
    axes.autoscale_view()
    # heights as shares of the axes, as those of the names are
    to_shares = axes.transData + axes.transAxes.inverted()
    heights = {name: float(to_shares.transform((name.x, name.y))[1]) for name in names}
    order = sorted(names, key=heights.__getitem__)
    for name, height in zip(order, point_names.spread([heights[n] for n in order]), strict=True):
        axes.annotate(
            name.text,
            (name.x, name.y),
            xytext=(BESIDE, height),
            textcoords="axes fraction",
            arrowprops={
                "arrowstyle": "-",
                "color": name.colour,
                "linewidth": 0.7,
                "linestyle": ":",
            },
            color=name.colour,
            va="center",
            fontsize=9,
        )
