"""In what the configurations of two runs differ, so that one cannot be resumed as the other."""

from __future__ import annotations

from typing import Any

__all__ = ["deepest_difference", "differing_keys"]


def differing_keys(old: dict[str, Any], new: dict[str, Any], grows: tuple[str, ...]) -> list[str]:
    """Returns the keys in which two configurations differ, without those that may grow.

    A search may also get longer axes, and a second look.
    """
    keys = dict.fromkeys([*old, *new])
    if widened(old.get("search"), new.get("search")):
        keys.pop("search", None)
    if new.get("second_look") or not old.get("second_look"):
        keys.pop("second_look", None)
    return [key for key in keys if key not in grows and old.get(key) != new.get(key)]


def widened(old: Any, new: Any) -> bool:
    """Returns whether a search along the new axes continues one along the old axes.

    Both are as `Space.config` makes them. Each new axis must be the old one, or the old one with
    more values at its ends: then all that was tried is still a point of the space, with the same
    neighbours.

    >>> old = {"x": {"values": [1, 2], "start": 1}}
    >>> widened(old, {"x": {"values": [1, 2, 3], "start": 1}})
    True
    >>> widened(old, {"x": {"values": [1, 1.5, 2], "start": 1}})
    False
    """

    def longer(before: Any, after: Any) -> bool:
        try:
            had, has = list(before["values"]), list(after["values"])
            runs = (has[i : i + len(had)] for i in range(len(has) - len(had) + 1))
            return before["start"] == after["start"] and had in runs
        except (TypeError, KeyError):
            return False

    if not isinstance(old, dict) or not isinstance(new, dict):
        return False
    return old.keys() == new.keys() and all(longer(old[name], new[name]) for name in old)


def deepest_difference(path: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Returns the first difference within two values, and where it is.

    >>> deepest_difference("search", {"lr": {"at": 1}, "eps": {}}, {"lr": {"at": 2}, "eps": {}})
    ('search.lr.at', 1, 2)
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if old.get(key) != new.get(key):
                return deepest_difference(f"{path}.{key}", old.get(key), new.get(key))
    return path, old, new
