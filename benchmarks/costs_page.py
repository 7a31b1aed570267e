"""Writes docs/costs.md from the tables of the other scripts.

    python benchmarks/costs_page.py

It measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from softsphere_lab.report import grids
from softsphere_lab.timing.benchmark import read_table

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "costs.md"
# Values by (layer, D, d, m, measure).
Key = tuple[str, int, int, int, str]
SENT = "bytes that a rank gives to them"


class Table:
    """The table of one script, with the machine that it was measured on."""

    def __init__(self, name: str) -> None:
        rows = read_table(HERE / f"{name}.csv")
        self.name = name
        threads = f"{rows[0]['threads']} thread{'s' * (rows[0]['threads'] != '1')}"
        self.host = f"{rows[0]['machine']}, {threads}, torch {rows[0]['torch']}"
        self.values: dict[Key, str] = {
            (row["layer"], int(row["D"]), int(row["d"]), int(row["m"]), row["measure"]): row[
                "value"
            ]
            for row in rows
        }
        # in the order of the table, each once
        self.settings = list(dict.fromkeys(key[1:4] for key in self.values))
        self.layers = list(dict.fromkeys(key[0] for key in self.values))

    @property
    def source(self) -> str:
        script = f"../benchmarks/{self.name}"
        return f"[`{self.name}.py`]({script}.py), [table]({script}.csv); {self.host}"

    def number(self, layer: str, setting: tuple[int, int, int], measure: str) -> float | None:
        """A value of the table, or None where it was not measured."""
        value = self.values.get((layer, *setting, measure))
        return None if value is None else float(value)

    def value(self, layer: str, setting: tuple[int, int, int], measure: str) -> float:
        return float(self.values[(layer, *setting, measure)])


def shown(value: float | None, digits: int = 3) -> str:
    """A ratio in a few significant digits; a dash where it was not measured.

    >>> shown(512.5), shown(6.7299), shown(0.407), shown(None)
    ('512', '6.73', '0.407', '–')
    """
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"


def described(setting: tuple[int, int, int]) -> str:
    D, d, m = setting
    return f"m = {m:,}, D = {D:,}, d = {d}"


def on_logits() -> str:
    table = Table("logits_losses_vs_cross_entropy")
    (setting,) = table.settings
    rows = [
        (
            f"`{name}`",
            shown(table.value(name, setting, "time over F.cross_entropy")),
            shown(table.value(name, setting, "extra memory over logits"), 2),
        )
        for name in table.layers
    ]
    grid = grids.markdown(("criterion", "time", "extra memory, in sizes of the logits"), rows)
    return f"""\
## Losses on logits

Time and memory of forward and backward at {setting[2]:,} × {setting[0]:,} in float32. The times are
in multiples of that of `F.cross_entropy`, which was measured in turn with them.

{grid}
*{table.source}*
"""


def any_optimizer() -> str:
    table = Table("gram_vs_softmax")
    chunks = [name for name in table.layers if name.startswith("core, chunk")]

    def faster(setting: tuple[int, int, int], names: Sequence[str]) -> str:
        times = [t for x in names if (t := table.number(x, setting, "seconds")) is not None]
        return shown(min(times) / table.value("gram", setting, "seconds") if times else None)

    rows = [
        (
            described(setting),
            faster(setting, ["softmax"]),
            faster(setting, ["softmax, compiled"]),
            faster(setting, chunks),
            faster(setting, ["core, automatic"]),
            f"{100 * table.value('gram', setting, 'extra memory in sizes of the logits'):.2g} %",
        )
        for setting in table.settings
    ]
    header = (
        "size",
        "`F.cross_entropy`",
        "the same, compiled",
        "`F.linear_cross_entropy`, best chunk",
        "the same, automatic chunk",
        "memory, in sizes of the logits",
    )
    micro = Table("accumulated_micro_batches")
    ratios = "; ".join(
        f"{shown(micro.value('gram', s, 'times faster within accumulate()'))} times at "
        f"D = {s[0]:,}, d = {s[1]}"
        for s in micro.settings
    )
    return f"""\
## LinearSphericalLoss: many classes, any optimizer

How many times longer softmax takes than the Gram engine, forward and backward in float32, and the
memory that the Gram engine needs besides the gradients. A dash stands for a softmax that was ended
after 90 seconds.

{grids.markdown(header, rows)}
*{table.source}*

Within `head.accumulate()` eight micro-batches of {micro.settings[0][2]} rows are faster than
without: {ratios}. [Which engine for my m, D and d](engines.md) has sizes
from one row to 4,096 and from a hundred classes to a million.

*{micro.source}*
"""


def factored_layer() -> str:
    table, ours = Table("factored_vs_other_layers"), "factored Taylor (ours)"
    compiled = "factored Taylor, compiled (ours)"
    core = [name for name in table.layers if name.startswith("softmax, core fused")]
    named = {
        "`F.linear`, `F.cross_entropy` and SGD": ["softmax"],
        "`F.linear_cross_entropy` at its best chunk and SGD": core,
        "`nn.AdaptiveLogSoftmaxWithLoss` and SGD": ["adaptive softmax"],
        "two-level hierarchical softmax and sparse SGD": ["hierarchical softmax"],
        "sampled softmax with 1,024 negatives and sparse SGD": ["sampled softmax, 1024"],
        "`LinearSphericalLoss`, Gram engine, and SGD": ["linear Taylor, gram (ours)"],
        "`FactoredSphericalLoss` itself, in compiled steps": [compiled],
    }

    def longer(names: Sequence[str], setting: tuple[int, int, int]) -> str:
        found = [t for x in names if (t := table.number(x, setting, "times ours")) is not None]
        return shown(min(found, default=None))

    rows = [
        (label, *(longer(names, setting) for setting in table.settings))
        for label, names in named.items()
    ]
    grid = grids.markdown(("layer", *map(described, table.settings)), rows)
    flat, products = Table("factored_over_classes"), Table("factored_vs_its_products")
    wear, memory = Table("factored_wear"), Table("factored_memory")
    most = flat.settings[-1]
    growth = shown(flat.value(ours, most, "times that at D = 10,000"))
    of_products = ", and\n  ".join(
        f"{shown(products.value(ours, s, 'times its products'))} (compiled "
        f"{shown(products.value(compiled, s, 'times its products'))}) at {described(s)}"
        for s in products.settings
    )
    once = " and ".join(shown(1e3 * table.value(ours, s, "seconds")) for s in table.settings)
    worn = shown(wear.value("factored squared error", wear.settings[0], "slowest over first"))
    peak = shown(max(float(value) for value in memory.values.values()))
    return f"""\
## FactoredSphericalLoss: many classes, SGD

How many times longer each other layer takes for a whole training step in float32: forward,
backward, update and the mending of the factors.

{grid}
*{table.source}*

The steps of the factored layer took {once} milliseconds. Such ratios depend on the processor:
softmax waits for its memory, and a factored step for many short operations.

- **Flat in D.** A step at D = {most[0]:,} takes {growth} times that at D = 10,000, with
  d = m = {most[1]}. *{flat.source}*
- **Against its own products.** In multiples of the time of the matrix products that it cannot do
  without, a step takes {of_products}.
  *{products.source}*
- **Wear.** The squared error wears the factors out fastest. In ten thousand steps of it the slowest
  thousand take {worn} times as long as the first, all mending included. *{wear.source}*
- **Memory.** Steps, mending, saving and loading from a mapped file peak at {peak} times the bytes
  of W. *{memory.source}*
"""


def clustered_layer() -> str:
    table, ours = Table("clustered_vs_other_layers"), "clustered Taylor (ours)"
    named = {
        "`F.linear`, `F.cross_entropy` and SGD": "softmax",
        "`nn.AdaptiveLogSoftmaxWithLoss`, cutoffs 2,000, 10,000 and 40,000": (
            "adaptive softmax, cutoffs 2000, 10000, 40000"
        ),
        "`nn.AdaptiveLogSoftmaxWithLoss`, cutoffs 2,000, 20,000 and, beyond that, 200,000": (
            "adaptive softmax"
        ),
        "two-level hierarchical softmax and sparse SGD": "hierarchical softmax",
        "sampled softmax with 1,024 negatives and sparse SGD": "sampled softmax, 1024",
        "`ClusteredLoss` with `bias=False`, as the other layers have none": (
            "clustered Taylor, without bias (ours)"
        ),
        '`ClusteredLoss` with `leaf="softmax"`': "clustered softmax (ours)",
        "`ClusteredLoss` with `sparse=False`": "clustered Taylor, dense gradient (ours)",
        '`ClusteredLoss` with `engine="factored"`': "clustered Taylor, factored (ours)",
    }
    compared = [s for s in table.settings if table.number("softmax", s, "times ours") is not None]
    rows = [
        (label, *(shown(table.number(name, s, "times ours")) for s in compared))
        for label, name in named.items()
    ]
    grid = grids.markdown(("layer", *map(described, compared)), rows)
    many = next(s for s in table.settings if s not in compared)
    few = compared[-1][0]
    growth = table.value("clustered Taylor, factored (ours)", many, f"times that at D = {few:,}")
    scored = " and ".join(
        f"{shown(table.value(ours, s, 'log-probability over training forward'))} (D = {s[0]:,})"
        for s in compared
    )
    return f"""\
## ClusteredLoss: many classes, exact probabilities

How many times longer each other layer takes for a whole training step in float32 than
`ClusteredLoss` with log-Taylor softmax in the clusters, `sparse=True` and SGD. It has a shortlist
of 2,000 classes and 256 clusters, or 1,024 clusters from half a million classes on.

{grid}
*{table.source}*

- **Flat in D.** With `engine="factored"` a step at D = {many[0]:,} takes {shown(growth)} times
  that at D = {few:,}, with as many clusters.
- **Scores.** The exact log-probability of one given class for each row takes as long as the forward
  of a training step: {scored} times.
"""


def many_processes() -> str:
    table, softmax = Table("two_processes"), "vocabulary-parallel softmax"
    named = {
        "`LinearSphericalLoss`, Gram engine": "linear Taylor, gram (ours)",
        "`ClusteredLoss`, log-Taylor, without a shortlist": "clustered Taylor (ours)",
        "`FactoredSphericalLoss`": "factored Taylor (ours)",
    }
    timed = [s for s in table.settings if table.number(softmax, s, "seconds") is not None]
    rows = [
        (label, *(shown(table.number(softmax, s, f"times {name}")) for s in timed))
        for label, name in named.items()
    ]
    ours = next(iter(named.values()))
    counted = sorted(s for s in table.settings if table.number(ours, s, SENT) is not None)
    sent = [
        (label, *(f"{table.value(name, s, SENT):,.0f}" for s in counted))
        for label, name in named.items()
    ]
    rest = f"d = {counted[0][1]}, m = {counted[0][2]}"
    return f"""\
## Two processes

How many times longer a step of vocabulary-parallel softmax (`loss_parallel`) takes than one of our
sharded layers, each with SGD. Both processes have one thread, and m counts the rows of both.

{grids.markdown(("layer", *map(described, timed)), rows)}
The bytes that a process gives to the collectives of a step, with {rest}:

{grids.markdown(("layer", *(f"D = {D:,}" for D, _, _ in counted)), sent)}
*{table.source}*
"""


HEAD = """\
# What a step costs

Every table of this page was measured by a script in `benchmarks/`. The machine did other work at
times, so only ratios within one run are shown. The times of all layers from 10,000 to 10,000,000
classes are an experiment: [Seconds a step](results.md#seconds-a-step).
"""


def page() -> str:
    """The text of docs/costs.md."""
    parts = clustered_layer, factored_layer, any_optimizer, many_processes, on_logits
    return "\n".join((HEAD, *(part() for part in parts)))


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
