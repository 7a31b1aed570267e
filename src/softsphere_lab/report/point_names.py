"""Names beside points: inside the axes, off the curves and off each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.transforms import Bbox

if TYPE_CHECKING:  # they take long to import
    from matplotlib.axes import Axes

__all__ = ["Name", "obstacles", "place", "spread"]

# How far a name is from its point, in points; nearer comes first.
DISTANCES = (5, 8, 12, 17, 23)
# A marker, in points.
MARKER = 7
# Where a name is put about its point: to the right, the left, above, below, and at the corners.
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
Segment = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Name:
    """What is to be written beside the point (x, y), in the axes' own numbers."""

    text: str
    x: float
    y: float
    colour: Any


def place(axes: Axes, names: Sequence[Name], size: float = 9) -> None:
    """Writes each name at the first free place about its point, or the one that covers least.

    To be called when everything else is drawn and the limits of the axes are those that stay.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    segments, boxes = obstacles(axes)
    inside = axes.get_window_extent()
    for name in names:
        text = axes.text(name.x, name.y, name.text, color=name.colour, fontsize=size)
        extent = text.get_window_extent()
        x, y = axes.transData.transform((name.x, name.y)).tolist()
        choices = []
        for rank, (distance, side) in enumerate(product(DISTANCES, SIDES)):
            gap = distance * figure.dpi / 72
            box = _beside((x, y), side, gap, extent.width, extent.height)
            strangers = sum(_gap(box, other) < _gap(box, _point(x, y)) for other in boxes)
            # the worst first: it leaves the axes, covers things, is nearer to another point
            choices.append(((*_covered(box, segments, boxes, inside), strangers, rank), box))
        box = min(choices, key=lambda each: each[0])[1]
        text.set_position(axes.transData.inverted().transform((box.x0, box.y0)).tolist())
        text.set_verticalalignment("bottom")
        # the layout must not move the axes for a name that was placed in them
        text.set_in_layout(False)
        boxes.append(box)


def obstacles(axes: Axes) -> tuple[list[Segment], list[Bbox]]:
    """Returns the straight pieces of curves and intervals, and the boxes of markers, in pixels."""
    from matplotlib.collections import LineCollection

    figure = axes.get_figure(root=True)
    assert figure is not None
    segments: list[Segment] = []
    boxes: list[Bbox] = []
    half = MARKER * figure.dpi / 72 / 2

    def mark(points: Iterable[Sequence[float]]) -> None:
        for x, y in points:
            boxes.append(Bbox.from_extents(x - half, y - half, x + half, y + half))

    for line in axes.get_lines():
        points = line.get_transform().transform(line.get_xydata())
        points = points[np.isfinite(points).all(1)]
        if line.get_marker() not in ("None", "", None):
            mark(points)
        if line.get_linestyle() != "None":
            segments += pairwise(map(tuple, points.tolist()))
    for collection in axes.collections:
        if isinstance(collection, LineCollection):
            for piece in collection.get_segments():
                points = axes.transData.transform(piece)
                if np.isfinite(points).all():
                    segments += pairwise(map(tuple, points.tolist()))
        else:
            offsets = np.ma.getdata(collection.get_offsets())
            mark(collection.get_offset_transform().transform(offsets))
    return segments, boxes


def spread(heights: Sequence[float], gap: float = 0.055) -> list[float]:
    """Returns ascending heights moved apart by at least the gap, below 1 where they have room.

    >>> [round(x, 3) for x in spread([0.2, 0.2, 0.99, 1.0], 0.1)]
    [0.2, 0.3, 0.9, 1.0]
    """
    apart: list[float] = []
    for height in heights:
        apart.append(max(height, apart[-1] + gap) if apart else height)
    ceiling = 1.0
    for i in reversed(range(len(apart))):
        apart[i] = min(apart[i], ceiling)
        ceiling = apart[i] - gap
    return apart


def _beside(
    at: Sequence[float], side: tuple[int, int], distance: float, width: float, height: float
) -> Bbox:
    """The box of a name on that side of a point."""
    across, up = side
    x = at[0] + across * distance + (across - 1) * width / 2
    y = at[1] + up * distance + (up - 1) * height / 2
    return Bbox.from_bounds(x, y, width, height)


def _point(x: float, y: float) -> Bbox:
    return Bbox.from_extents(x, y, x, y)


def _gap(box: Bbox, other: Bbox) -> float:
    """The squared distance between two boxes."""
    across = max(0.0, box.x0 - other.x1, other.x0 - box.x1)
    up = max(0.0, box.y0 - other.y1, other.y0 - box.y1)
    return float(across**2 + up**2)


def _covered(
    box: Bbox, segments: Sequence[Segment], boxes: Sequence[Bbox], inside: Bbox
) -> tuple[int, int]:
    """How much a box covers: zeros where it is free."""
    within = inside.containsx(box.x0) and inside.containsx(box.x1)
    within = within and inside.containsy(box.y0) and inside.containsy(box.y1)
    overlaps = sum(box.overlaps(other) for other in boxes)
    return int(not within), overlaps + sum(_crosses(box, piece) for piece in segments)


def _crosses(box: Bbox, segment: Segment) -> bool:
    """Whether a straight piece has a point in a box, by cutting it at each side (Liang, Barsky)."""
    (x0, y0), (x1, y1) = segment
    begin, end = 0.0, 1.0
    for delta, low, high in (
        (x1 - x0, box.x0 - x0, box.x1 - x0),
        (y1 - y0, box.y0 - y0, box.y1 - y0),
    ):
        if delta == 0:
            if low > 0 or high < 0:
                return False
            continue
        first, last = sorted((low / delta, high / delta))
        begin, end = max(begin, first), min(end, last)
    return begin <= end
