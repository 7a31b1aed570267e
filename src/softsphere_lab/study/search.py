"""A search on a lattice, which goes to the best neighbour until no neighbour is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Axis", "Badness", "Space", "Values", "search"]

Values = dict[str, float]
Badness = tuple[float, ...]


@dataclass(frozen=True)
class Axis:
    """Values in ascending order, and the value that a search begins with."""

    values: tuple[float, ...]
    start: float

    @classmethod
    def fixed(cls, value: float) -> Axis:
        """Returns an axis with one value, so that there is nothing to search for."""
        return cls((value,), value)


@dataclass(frozen=True)
class Space:
    """All points that may be tried: every combination of values of the axes."""

    axes: Mapping[str, Axis]

    @property
    def size(self) -> int:
        """The number of points."""
        return math.prod(len(axis.values) for axis in self.axes.values())

    @property
    def start(self) -> Values:
        """The point that is tried first."""
        return {name: axis.start for name, axis in self.axes.items()}

    def around(self, point: Values) -> list[Values]:
        """Returns the point, and those one step away along one axis.

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
        """Returns the space that begins at a point and varies only the axes with these names.

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
        """Returns the axes as JSON."""
        return {
            name: {"values": list(axis.values), "start": axis.start}
            for name, axis in self.axes.items()
        }


def search(
    space: Space,
    badness: Callable[[Values], Badness | None],
    guess: Callable[[Values], Badness | None] | None = None,
) -> tuple[list[Values], Values | None]:
    """Returns the points that have to be tried next, and the end of the search if there are none.

    From the start the search goes to the best point around, and it ends where no point around is
    better. It ends at the edge of an axis only where the axis ends, so axes should reach beyond all
    sensible values.

    Args:
        space: what may be tried.
        badness: what is minimised, None for a point that was not tried.
        guess: what badness might be, None for no idea. With a guess, the points around are tried
            one by one, those that should be best first, and the search goes on as soon as one of
            them is better. It ends where it could end without, and tries fewer points.

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
        found = [(each, badness(each)) for each in around]
        waiting = [each for each, bad in found if bad is None]
        known = [(bad, i) for i, (_, bad) in enumerate(found) if bad is not None]
        # of equal points the first, which is where the search stands
        best = around[min(known)[1]] if known else point
        if guess is not None:
            waiting = _most_promising(waiting, point, best, guess)
        if waiting:
            return waiting, None
        if best == point:
            return [], point
        point = best


def _most_promising(
    waiting: list[Values], point: Values, best: Values, guess: Callable[[Values], Badness | None]
) -> list[Values]:
    """Which of the points around one that were not tried have to be tried next.

    best: the best of those that were tried.
    """
    untried = point in waiting
    if best != point and not untried:
        return []
    guesses = [(each, guess(each)) for each in waiting if each != point]
    guesses.sort(key=lambda pair: (pair[1] is None, pair[1] or ()))
    # the first of them is needed whatever the point itself turns out to be
    return ([point] if untried else []) + [each for each, _ in guesses[:1]]
