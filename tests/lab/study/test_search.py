"""The search on a lattice: where it goes, and where it ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from softsphere_lab.study.search import Axis, Space, search


def walk(space: Space, height, guess=None) -> tuple[list[dict], dict]:
    """All that a search tries, and its end."""
    tried: dict[tuple, tuple[float, ...]] = {}
    while True:
        waiting, best = search(space, lambda point: tried.get(tuple(point.values())), guess)
        if best is not None:
            return [dict(zip(space.axes, point, strict=True)) for point in tried], best
        for point in waiting:
            assert tuple(point.values()) not in tried
            tried[tuple(point.values())] = (height(point),)


HEIGHTS = st.lists(st.integers(0, 5), min_size=9, max_size=9)
GUESSES = st.lists(st.none() | st.integers(0, 5), min_size=9, max_size=9)


@given(HEIGHTS, st.integers(0, 8), st.none() | GUESSES)
def test_it_ends_where_no_neighbour_is_better(heights, start, guesses):
    def guess(point):
        height = guesses[int(point["x"])]
        return None if height is None else (height,)

    axis = Axis(tuple(float(x) for x in range(9)), float(start))
    given_ = None if guesses is None else guess
    _, best = walk(Space({"x": axis}), lambda point: heights[int(point["x"])], given_)
    place = int(best["x"])
    around = [heights[i] for i in (place - 1, place + 1) if 0 <= i < 9]
    assert all(heights[place] <= height for height in around)
    assert heights[place] <= heights[start]


def test_it_finds_the_bottom_of_a_valley_far_from_the_start_and_tries_little_on_the_way():
    axes = {name: Axis(tuple(range(-10, 11)), 0) for name in "xy"}
    tried, best = walk(Space(axes), lambda p: (p["x"] - 4) ** 2 + (p["y"] + 3) ** 2)
    assert best == {"x": 4, "y": -3}
    assert len(tried) <= 3 * 7 + 5


def test_with_a_guess_it_tries_no_point_behind_it():
    """A good guess is followed at once, and a wrong one costs a point."""
    space = Space({"x": Axis(tuple(range(9)), 2)})

    def height(point):
        return abs(point["x"] - 5)

    tried, best = walk(space, height, lambda point: (height(point),))
    assert best == {"x": 5} and [point["x"] for point in tried] == [2, 3, 4, 5, 6]
    tried, best = walk(space, height, lambda point: (-height(point),))
    assert best == {"x": 5} and [point["x"] for point in tried] == [2, 1, 3, 4, 5, 6]
    # what the search without a guess tried is all that it needs
    assert [point["x"] for point in walk(space, height)[0]] == [2, 1, 3, 4, 5, 6]


def test_of_equals_it_stays_where_it_is():
    tried, best = walk(Space({"x": Axis((1, 2, 3), 2)}), lambda _: 1.0)
    assert best == {"x": 2} and len(tried) == 3
