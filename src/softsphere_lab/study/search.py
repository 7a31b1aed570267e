"""A search on a lattice: to the best of the neighbours, until there is no better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Axis", "Space", "search"]

Values = dict[str, float]
Badness = tuple[float, ...]


@dataclass(frozen=True)
class Axis:
    """Values in ascending order, and the one that a search begins with."""

    values: tuple[float, ...]
    start: float

    @classmethod
    def fixed(cls, value: float) -> Axis:
        """Nothing to search along."""
        return cls((value,), value)


@dataclass(frozen=True)
class Space:
    """What may be tried: every combination of a value of each axis."""

    axes: Mapping[str, Axis]

    @property
    def size(self) -> int:
        """How many combinations there are."""
        return math.prod(len(axis.values) for axis in self.axes.values())

    @property
    def start(self) -> Values:
        """The first to be tried."""
        return {name: axis.start for name, axis in self.axes.items()}

    def around(self, point: Values) -> list[Values]:
        """The point, and those one step from it along one axis.

        >>> space = Space({"x": Axis((1, 2, 3), 2), "y": Axis((5, 6), 5)})
        >>> space.around(space.start)[1:]
        [{'x': 1, 'y': 5}, {'x': 3, 'y': 5}, {'x': 2, 'y': 6}]
        """
        points = [point]
        for name, axis in self.axes.items():
            place = axis.values.index(point[name])
            for other in (place - 1, place + 1):
                if 0 <= other < len(axis.values):
                    points.append({**point, name: axis.values[other]})
        return points

    def about(self, point: Values, free: Container[str]) -> Space:
        """The same seen from a point, along the axes of these names alone.

        >>> Space({"x": Axis((1, 2), 1), "y": Axis((5, 6), 5)}).about({"x": 2, "y": 6}, {"x"}).axes
        {'x': Axis(values=(1, 2), start=2), 'y': Axis(values=(6,), start=6)}
        """
        return Space(
            {
                name: Axis(axis.values, point[name]) if name in free else Axis.fixed(point[name])
                for name, axis in self.axes.items()
            }
        )

    def config(self) -> dict[str, Any]:
        """As JSON."""
        return {
            name: {"values": list(axis.values), "start": axis.start}
            for name, axis in self.axes.items()
        }


def search(
    space: Space, badness: Callable[[Values], Badness | None]
) -> tuple[list[Values], Values | None]:
    """What has to be tried next, and the end of the search once there is nothing.

    badness: of what has been tried, None of the rest. From the start the search goes to the best of
    all that is around, and ends where nothing around is better: what it ends with is at the edge of
    an axis only where the axis ends, which is to be far from anything sensible.

    >>> space = Space({"x": Axis((1, 2, 3, 4), 1)})
    >>> tried = {1: (5.0,), 2: (4.0,)}
    >>> search(space, lambda point: tried.get(point["x"]))
    ([{'x': 3}], None)
    >>> tried[3] = (4.5,)
    >>> search(space, lambda point: tried.get(point["x"]))
    ([], {'x': 2})
    """
    point = space.start
    while True:
        around = space.around(point)
        known = [(each, badness(each)) for each in around]
        waiting = [each for each, bad in known if bad is None]
        if waiting:
            return waiting, None
        # the first of equals, which is where it stands
        best = min(known, key=lambda pair: pair[1] or ())[0]
        if best == point:
            return [], point
        point = best
