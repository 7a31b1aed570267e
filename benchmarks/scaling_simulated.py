"""Writes the tables and the picture of docs/many_processes.md, on up to 4,096 ranks.

    python benchmarks/scaling_simulated.py
    python benchmarks/scaling_simulated.py --latency 3e-5 --bandwidth 1.25e9 --flops 1e12 --print

It measures nothing: times are simulated from the FLOPs of a rank and from the cost models of
`softsphere_lab.timing.collectives`, with a latency, a bandwidth and a FLOP rate that are arguments.
--print prints the tables and leaves the page alone.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from softsphere_lab.report import grids
from softsphere_lab.report.canvas import legend_below, log_scale, markers, save, tidy
from softsphere_lab.timing.clock import milliseconds
from softsphere_lab.timing.collectives import ALGORITHMS, Network
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.sharded_steps import (
    CLUSTERED,
    FACTORED,
    GRAM,
    SHARDED,
    SOFTMAX,
    Machine,
    scales_to,
    simulated,
)

PAGE = Path(__file__).parents[1] / "docs" / "many_processes.md"
PICTURE = Path(__file__).with_suffix(".png")
BEGIN, END = (
    f"<!-- {word} of what benchmarks/scaling_simulated.py writes -->\n" for word in ("begin", "end")
)
LABELS = {
    GRAM: "Gram engine",
    FACTORED: "factored",
    CLUSTERED: "clustered",
    SOFTMAX: "vocabulary-parallel softmax",
}
MACHINE = Machine(Network(latency=5e-6, bandwidth=25e9), flops=1e14)
MOST = 4_096
SHOWN = (64, 256, 1_024, 4_096)
SIZES, SIZED_RANKS = tuple(10**power for power in range(5, 10)), 64
# A batch of all ranks that stays the same, and one to which each rank adds rows.
FIXED = (
    Setting(D=1_000_000, d=1_024, m=16_384),
    Setting(D=100_000_000, d=256, m=16_384),
    Setting(D=1_000_000_000, d=256, m=16_384),
)
ROWS_OF_A_RANK = 64


def size(count: float) -> str:
    """A number of bytes as a person writes it.

    >>> size(2_560_000_000), size(404_696)
    ('2.56 GB', '405 kB')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def sizing() -> str:
    """Bytes that a rank keeps and sends, by the number of classes."""
    header = ("classes", *(f"{label}: kept" for label in LABELS.values()))
    header += ("Gram engine with Adam: kept", "softmax: logits")
    rows = []
    for D in SIZES:
        s = Setting(D, 256, 16_384)
        kept = [SHARDED[name].kept(s, SIZED_RANKS) for name in LABELS]
        adam = kept[0] + 2 * SHARDED[GRAM].state(s, SIZED_RANKS)
        logits = SHARDED[SOFTMAX].at_work(s, SIZED_RANKS)
        rows.append((f"{D:,}", *map(size, (*kept, adam, logits))))
    return grids.markdown(header, rows)


def traffic() -> str:
    """Messages and bytes that a rank sends in a step, by the number of ranks."""
    s = FIXED[-1]
    rows = []
    for n in (2, 16, *SHOWN):
        each = [f"{size(SHARDED[x].sent(s, n))} in {len(SHARDED[x].calls(s, n))}" for x in LABELS]
        rows.append((f"{n:,}", *each))
    return grids.markdown(("ranks", *LABELS.values()), rows)


def scaling(machine: Machine) -> str:
    """Milliseconds of a step, how much of it is sending, and where it stops scaling."""
    header = ("setting", "layer", *(f"{n:,} ranks" for n in SHOWN), "scales to")
    rows = []
    for s in FIXED:
        for name, label in LABELS.items():
            steps = [simulated(name, s, n, machine) for n in SHOWN]
            shown = [
                f"{milliseconds(x.seconds)} ms, {100 * x.sending / x.seconds:.0f} %" for x in steps
            ]
            limit = scales_to(name, s, machine, MOST)
            reached = f"{limit:,} or more" if limit == MOST else f"{limit:,}"
            rows.append((str(s), label, *shown, reached))
    return grids.markdown(header, rows)


def reaching(machine: Machine) -> str:
    """How many ranks softmax needs for the time that the Gram engine has on the fewest shown."""
    told = []
    for s in FIXED:
        goal = simulated(GRAM, s, SHOWN[0], machine).seconds
        many = [2**i for i in range(13) if simulated(SOFTMAX, s, 2**i, machine).seconds <= goal]
        needed = f"{many[0]:,} ranks" if many else f"more than {MOST:,} ranks"
        told.append(f"{needed} at {s.D:,} classes")
    return (
        f"To reach the time that the Gram engine has on {SHOWN[0]} ranks, vocabulary-parallel "
        f"softmax needs {', '.join(told[:-1])} and {told[-1]}."
    )


def section(machine: Machine) -> str:
    """What stands in the page between the two marks."""
    network = machine.network
    ways = f"Collectives are carried out by a {machine.algorithm}."
    if machine.algorithm == "best":
        ways = "Of ring and tree the faster one is taken for each collective."
    said = textwrap.fill(
        "Simulated milliseconds of a step, and the share of them that is spent on sending. A "
        f"message arrives after {1e6 * network.latency:.3g} µs, a rank sends "
        f"{network.bandwidth / 1e9:.3g} GB/s and computes {machine.flops / 1e12:.3g} TFLOP/s, and "
        f"nothing overlaps. {ways} The last column is the number of ranks beyond which doubling "
        "them saves less than a tenth of a step.",
        100,
    )
    return f"""\
### Bytes of a rank

On {SIZED_RANKS} ranks, with d = 256 and {FIXED[-1].m:,} rows in all, in float32 and without
the state of an optimizer unless it is named:

{sizing()}
### Bytes of a step

What a rank sends in a step with d = 256 and {FIXED[-1].m:,} rows in all, whatever D is, if every
collective is carried out by a ring, and the number of collectives:

{traffic()}
### Where it stops scaling

{said}

{scaling(machine)}
{textwrap.fill(reaching(machine), 100)}
"""


def page(text: str, machine: Machine = MACHINE) -> str:
    """The page with its section made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section(machine)}\n{END}{rest.split(END)[1]}"


def draw(machine: Machine, path: Path) -> None:
    """Draws the time of a step over the ranks, of a fixed batch and of one that grows."""
    import matplotlib.pyplot as plt

    ranks = [2**power for power in range(13)]
    s = FIXED[-1]
    grown = [Setting(s.D, s.d, ROWS_OF_A_RANK * n) for n in ranks]
    panels = {
        f"{s.m:,} rows in all": [s] * len(ranks),
        f"{ROWS_OF_A_RANK} rows of each rank": grown,
    }
    figure, both = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=True)
    for axes, (title, settings) in zip(both, panels.items(), strict=True):
        for (name, label), marker in zip(LABELS.items(), markers(len(LABELS)), strict=True):
            steps = [simulated(name, x, n, machine) for x, n in zip(settings, ranks, strict=True)]
            line = axes.plot(
                ranks, [1e3 * x.seconds for x in steps], marker=marker, markersize=4, label=label
            )[0]
            sending = [1e3 * x.sending for x in steps[1:]]
            axes.plot(ranks[1:], sending, linestyle=":", linewidth=1, color=line.get_color())
        axes.set(xlabel="ranks", title=title)
        tidy(axes)
    both[0].set_ylabel("milliseconds of a step")
    network = machine.network
    note = (
        f"Simulated at {s.D:,} classes, d = {s.d}, {1e6 * network.latency:.3g} µs a message, "
        f"{network.bandwidth / 1e9:.3g} GB/s and {machine.flops / 1e12:.3g} TFLOP/s a rank. "
        "Dotted: sending alone."
    )
    legend_below(figure, len(LABELS), note, handles=both[0].get_legend_handles_labels()[0])
    for axes in both:
        log_scale(axes, "x")
        log_scale(axes, "y")
    save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    network = MACHINE.network
    parser.add_argument("--latency", type=float, default=network.latency, help="seconds a message")
    parser.add_argument("--bandwidth", type=float, default=network.bandwidth, help="bytes a second")
    parser.add_argument("--flops", type=float, default=MACHINE.flops, help="a second and a rank")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=MACHINE.algorithm)
    parser.add_argument("--print", action="store_true", help="print, and leave the page alone")
    given = parser.parse_args()
    machine = Machine(Network(given.latency, given.bandwidth), given.flops, given.algorithm)
    if machine != MACHINE or given.print:
        print(section(machine))
    else:
        draw(machine, PICTURE)
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        print(PAGE)
