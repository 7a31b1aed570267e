"""Writes docs/engines.md and its picture from the table of `engines_by_size.py`.

    python benchmarks/engines_page.py

It measures nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from softsphere_lab.report import grids
from softsphere_lab.report.canvas import save
from softsphere_lab.timing.benchmark import read_table
from softsphere_lab.timing.clock import milliseconds
from softsphere_lab.timing.engines_in_turn import FEW, HOPELESS
from softsphere_lab.timing.linear_losses import ENGINES

TABLE = Path(__file__).with_name("engines_by_size.csv")
PICTURE = TABLE.with_suffix(".png")
PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
# Values by (m, D, d, layer, measure).
Values = Mapping[tuple[str, ...], str]
BEST, AUTO = ("best", "is"), ("auto", "times the best engine")
SHADES = ("#9ecae1", "#fdd0a2", "#a1d99b")

HEAD = """\
# Which engine for my m, D and d

`LinearSphericalLoss` asks `softsphere.engines.choose(m, num_classes, in_features, dtype, device)`,
which counts FLOPs and memory and says why. To name an engine yourself, pass
`options=LinearSphericalOptions(engine="chunked")` to the layer.

| engine | FLOPs, forward and backward | memory beyond gradients | take it where |
| --- | --- | --- | --- |
| dense | 6 m D d | 2 m D | D is small, or m is well below ⅔ d and the outputs fit in memory |
| chunked | 8 m D d | a tile | m is below ⅔ d and the outputs do not fit in memory |
| gram | 4 D d² + 4 m d² | m d, d² and some MiB | m is above ⅔ d and D is large |

The step of the factored layer (`FactoredSphericalLoss`), which is for SGD, has no D in it at all.

The choice looks at sizes, not at the numbers in W and H. The gram engine takes the mean row off
before it sums squares, so a large common row or bias costs no digits. But the error of its q =
hᵀSh, with S the Gram matrix of these rows, is relative to ‖S‖ ‖h‖² and not to q. If a row h is
nearly orthogonal to all rows of W less their mean, such a small q has lost its digits. With
`engine="auto"` this is noticed on a CPU, and the batch is computed in another way. Elsewhere pass
`accumulate_dtype=torch.float64`, or name the chunked engine.
"""


def values_of(rows: Sequence[Mapping[str, str]]) -> Values:
    key = ("m", "D", "d", "layer", "measure")
    return {tuple(row[x] for x in key): row["value"] for row in rows}


def sizes(values: Values) -> tuple[list[int], list[int], list[int]]:
    """The m, D and d of the table, each in ascending order."""
    m, D, d = (sorted({int(key[i]) for key in values}) for i in range(3))
    return m, D, d


def page(rows: Sequence[Mapping[str, str]]) -> str:
    """The text of docs/engines.md."""
    values = values_of(rows)
    host = rows[0]
    measured = f"""\
The times below are those of log-Taylor softmax, forward and backward in float32, on
{host["machine"]} with {host["threads"]} threads and torch {host["torch"]}
(`python benchmarks/engines_by_size.py`, `benchmarks/{TABLE.name}`).
An engine was not timed where it needs more than {HOPELESS} times the FLOPs of another and more than
{FEW / 1e9:.0f} GFLOP, or where the outputs would not have fitted in memory. "Logits" is a
criterion on the outputs of `F.linear`. That is the same work as dense, and as auto where auto is
dense, so the differences between those columns show the noise. It is largest where a gradient has
3 GB, whose pages the system hands out as it can.

![The fastest engine over m, D and d](../benchmarks/{PICTURE.name})
"""
    parts = [HEAD, measured]
    for classes in sizes(values)[1]:
        parts.append(f"## {classes:,} classes\n\n{table(values, classes)}")
    return "\n".join(parts)


def table(values: Values, classes: int) -> str:
    """Milliseconds by engine at one number of classes, and how auto did."""
    m, _, d = sizes(values)
    times = (*ENGINES, "logits")
    header = ("m", "d", *(f"{name}, ms" for name in times), "auto is", "auto / best")
    lines = []
    for rows in m:
        for width in d:
            at = (str(rows), str(classes), str(width))
            if (*at, "auto", "is") not in values:
                continue
            taken = [values.get((*at, name, "seconds")) for name in times]
            shown = [milliseconds(float(seconds)) if seconds else "–" for seconds in taken]
            ratio = float(values[(*at, *AUTO)])
            auto = (values[(*at, "auto", "is")], f"{ratio:.2f}")
            lines.append((str(rows), str(width), *shown, *auto))
    return grids.markdown(header, lines)


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draws a map for each D, m across and d up: the fastest engine, its time and auto's ratio."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    values = values_of(rows)
    m, D, d = sizes(values)
    picture = plt.figure(figsize=(11, 6.2), layout="constrained")
    for axes, classes in zip(picture.subplots(2, 2).flat, D, strict=True):
        colours = [[math.nan] * len(m) for _ in d]
        for i, width in enumerate(d):
            for j, count in enumerate(m):
                at = (str(count), str(classes), str(width))
                if (*at, *BEST) not in values:
                    axes.text(j, i, "not\nmeasured", ha="center", va="center", fontsize=7.5)
                    continue
                best, ratio = values[(*at, *BEST)], float(values[(*at, *AUTO)])
                colours[i][j] = ENGINES.index(best)
                text = f"{best}\n{short(float(values[(*at, best, 'seconds')]))}\nauto {ratio:.2f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=7.5)
        shades = ListedColormap(SHADES)
        axes.imshow(colours, cmap=shades, vmin=0, vmax=2, aspect="auto", origin="lower")
        axes.set_xticks(range(len(m)), [f"{x:,}" for x in m])
        axes.set_yticks(range(len(d)), d)
        axes.set(xlabel="rows m", ylabel="width d")
        axes.set_title(f"{classes:,} classes", fontsize=10)
    picture.suptitle(
        "The fastest engine, its time forward and backward, and auto's time in multiples of it",
        fontsize=11,
    )
    save(picture, path)


def short(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2g} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.01 else f"{1e3 * seconds:.2g} ms"


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog=Path(__file__).name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    measured = read_table(TABLE)
    draw(measured, PICTURE)
    PAGE.write_text(page(measured), "utf-8")
    print(PAGE, PICTURE)
