"""Times are taken as often as was asked for, and compared turn by turn."""

from __future__ import annotations

from softsphere_lab.timing import clock
from softsphere_lab.timing.clock import Effort, in_turn, step_times
from softsphere_lab.timing.setting import Setting


def test_times_are_of_so_many_seconds_or_steps():
    setting, calls = Setting(10, 4, 4), []
    effort = Effort(seconds=0.0)
    times = step_times(lambda *batch: calls.append(batch), setting, effort)
    assert len(times) == effort.fewest and len(calls) == effort.fewest + effort.warm_up
    assert len(step_times(lambda *batch: None, setting, Effort(seconds=60))) == Effort.most


def test_runs_take_turns_after_one_turn_of_warm_up():
    calls = []
    times = in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, 5)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 5, "b": 5, "c": 5}
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(turns) == 6 and all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    # not always in the same order
    assert len(set(turns)) > 1


def test_the_number_of_turns_may_depend_on_the_longest_run(monkeypatch):
    monkeypatch.setattr(clock, "seconds_of", lambda run, device: run())
    told = []
    times = in_turn({"a": lambda: 1.0, "b": lambda: 4.0}, lambda longest: told.append(longest) or 2)
    assert told == [4.0] and times == {"a": [1.0, 1.0], "b": [4.0, 4.0]}
