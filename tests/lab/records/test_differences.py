"""What may differ between a record and the command that resumes it."""

from __future__ import annotations

from softsphere_lab.records.differences import widened
from softsphere_lab.study.search import Axis, Space


def test_a_search_goes_on_only_where_each_axis_is_the_old_one_or_longer():
    def axes(values, start=2.0, name="x"):
        return Space({name: Axis(values, start), "y": Axis((1.0,), 1.0)}).config()

    old = axes((2.0, 3.0))
    assert widened(old, old)
    assert widened(old, axes((1.0, 2.0, 3.0, 4.0)))
    assert not widened(axes((1.0, 2.0, 3.0)), old)
    assert not widened(old, axes((2.0, 2.5, 3.0)))
    assert not widened(old, axes((2.0, 3.0), start=3.0))
    assert not widened(old, axes((2.0, 3.0), name="z"))
    assert not widened(old, {"x": old["x"]})
    # whatever a hand may have written there
    for broken in (None, [], {"x": 1, "y": old["y"]}, {"x": {"values": 3}, "y": old["y"]}):
        assert not widened(broken, old) and not widened(old, broken)
