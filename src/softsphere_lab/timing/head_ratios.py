"""How many times longer than our engines the fastest exact softmax of a head takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from softsphere_lab.timing.benchmark import Cells, Row
from softsphere_lab.timing.head_measures import CAPTURED, MILLISECONDS, OURS
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.softmax_peers import GPU_SOFTMAX

__all__ = ["IN_FLOAT32", "fastest_exact_softmax", "label"]

FASTEST = "fastest softmax that skips nothing and sums nothing in bfloat16"
# How the head says that it is not computed in bfloat16.
IN_FLOAT32 = ", float32 "
# The milliseconds that count, by the end of the name of the ratio.
COUNTED: Mapping[str, tuple[str, ...]] = {
    "": (MILLISECONDS,),
    ", captured": (CAPTURED,),
    ", at best": (MILLISECONDS, CAPTURED),
}


def label(head: str, name: str) -> str:
    """Returns what a table calls a layer of a head; a peer has its version."""
    version = GPU_SOFTMAX[name].version() if name in GPU_SOFTMAX else ""
    return f"{head}: {name}{version}"


def fastest_exact_softmax(rows: Sequence[Cells]) -> Iterator[Row]:
    """The softmax that is the fastest of each head, and its time in times of each of our engines.

    Both are compared as Python runs them, captured as a graph, and each at its best, once every
    softmax that counts has been measured or left out.
    """
    heads: dict[tuple[str, Setting], list[Cells]] = {}
    for row in rows:
        head = row["layer"].partition(": ")[0]
        heads.setdefault((head, Setting(row["D"], row["d"], row["m"])), []).append(row)
    for (head, setting), measured in heads.items():
        exact = {
            name for name, peer in GPU_SOFTMAX.items() if peer.is_exact(IN_FLOAT32 not in head)
        }
        if not exact <= {_name(row["layer"]) for row in measured}:
            continue
        for how, counted in COUNTED.items():
            times = _least(measured, counted)
            theirs = exact & times.keys()
            if not theirs:
                continue
            best = min(theirs, key=times.__getitem__)
            fastest = f"{head}: {FASTEST}"
            yield Row(fastest, setting, f"is{how}", best)
            for engine in OURS:
                if engine in times:
                    ratio = times[best] / times[engine]
                    yield Row(fastest, setting, f"times {engine} (ours){how}", ratio)


def _name(layer: str) -> str:
    """The name of the layer with this label, whatever version its package had."""
    name = layer.partition(": ")[2]
    known = [each for each in (*OURS, *GPU_SOFTMAX) if f"{name} ".startswith(f"{each} ")]
    return max(known, key=len, default=name)


def _least(rows: Sequence[Cells], counted: Sequence[str]) -> dict[str, float]:
    """The least of these times of each layer, by its name."""
    least: dict[str, float] = {}
    for row in rows:
        if row["measure"] in counted:
            name = _name(row["layer"])
            least[name] = min(least.get(name, math.inf), float(row["value"]))
    return least
