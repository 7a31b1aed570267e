"""What does a linear output layer without logits cost, by each engine and beside softmax?

    python benchmarks/linear.py bars        # four settings against PyTorch's ways to softmax
    python benchmarks/linear.py grid        # all engines over m, D and d, and what auto chooses
    python benchmarks/linear.py accumulate  # eight micro-batches with one Gram matrix
    python benchmarks/linear.py gpu         # language-model heads on a GPU, against its peers
    python benchmarks/linear.py page        # docs/engines.md and its picture, from the table

Forward and backward, by hidden and weight; only ratios of one run mean anything on a CPU. A part
replaces its rows in benchmarks/linear.csv (with machine and versions).
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from measure import extra_bytes, read, record, seconds
from torch import Tensor

from softsphere import LinearSphericalLoss, LinearSphericalOptions, SphericalLoss
from softsphere.engines import choose
from softsphere.functional import linear_spherical_loss

TABLE = Path(__file__).with_name("linear.csv")
FIGURE = Path(__file__).with_name("linear.png")
PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
LOSS = "taylor_softmax"
ENGINES = ("dense", "chunked", "gram")

# What the bars promise: how many times faster than the best of softmax.
BARS = {(2048, 100_000, 512): 4, (1024, 262_144, 256): 10, (1024, 1_000_000, 64): 10}
BARS |= {(4096, 262_144, 256): 30}
# Seconds after which a single step is no longer waited for.
PATIENCE = 45
# An engine is not timed where it has so many times the FLOPs of another.
HOPELESS = 6


@dataclass(frozen=True)
class Setting:
    m: int
    D: int
    d: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden rows, weight and targets."""
        torch.manual_seed(0)
        hidden = torch.randn(self.m, self.d).requires_grad_()
        bound = 1 / math.sqrt(self.d)
        weight = torch.empty(self.D, self.d).uniform_(-bound, bound).requires_grad_()
        return hidden, weight, torch.randint(self.D, (self.m,))

    def row(self, layer: str, measure: str, value: float | str) -> dict[str, Any]:
        value = value if isinstance(value, str) else f"{value:.5g}"
        row = {"layer": layer, "m": self.m, "D": self.D, "d": self.d}
        print(f"{layer:34s} m={self.m:<5d} D={self.D:<8d} d={self.d:<4d} {measure}: {value}")
        return {**row, "measure": measure, "value": value}


def engine(name: str) -> peers.Layer:
    options = LinearSphericalOptions(engine=name)

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_spherical_loss(hidden, weight, target, LOSS, options=options)

    return loss


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return SphericalLoss(LOSS)(torch.nn.functional.linear(hidden, weight), target)


LAYERS: dict[str, Callable[[], peers.Layer]] = {
    **{name: (lambda name=name: engine(name)) for name in (*ENGINES, "auto", "triton")},
    "logits": lambda: plain,
    **peers.LAYERS,
}


def both_ways(layer: peers.Layer, setting: Setting) -> tuple[Callable[[], None], list[Tensor]]:
    """Forward and backward of a layer, and what holds the gradients."""
    hidden, weight, target = setting.tensors()

    def run() -> None:
        hidden.grad = weight.grad = None
        layer(hidden, weight, target).backward()

    return run, [hidden, weight]


def alone(name: str, setting: Setting) -> dict[str, float] | None:
    """Median seconds and extra memory of a layer in a process of its own; None: out of patience."""
    job = json.dumps([name, setting.m, setting.D, setting.d])
    try:
        result = subprocess.run(
            [sys.executable, __file__, "one", job],
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return None
    if result.returncode:
        raise SystemExit(f"{name} at {setting} failed:\n{result.stderr[-2000:]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def one(job: str) -> None:
    name, m, D, d = json.loads(job)
    setting = Setting(m, D, d)
    run, leaves = both_ways(LAYERS[name](), setting)
    first = seconds(run)
    times = [seconds(run) for _ in range(max(1, min(15, int(8 / first))))]
    for leaf in leaves:
        leaf.grad = None
    kept = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    extra = (extra_bytes(run) - kept) / (4 * m * D)
    print(json.dumps({"seconds": statistics.median(times), "extra": extra}))


def bars() -> None:
    rows = []
    for (m, D, d), least in BARS.items():
        setting = Setting(m, D, d)
        ours = alone("gram", setting)
        assert ours is not None
        rows.append(setting.row("gram", "seconds", ours["seconds"]))
        rows.append(setting.row("gram", "extra memory in sizes of the logits", ours["extra"]))
        best = math.inf
        for name in peers.LAYERS:
            found = alone(name, setting)
            if found is None:
                rows.append(setting.row(name, "seconds", f"more than {2 * PATIENCE}"))
                continue
            best = min(best, found["seconds"])
            rows.append(setting.row(name, "seconds", found["seconds"]))
        rows.append(setting.row("gram", "times faster than the best", best / ours["seconds"]))
        rows.append(setting.row("gram", "times faster to be reached", least))
    record(TABLE, "bars", rows)


def flops(setting: Setting) -> dict[str, float]:
    m, D, d = setting.m, setting.D, setting.d
    gram = 4 * (D + m) * d * d
    return {"dense": 6 * m * D * d, "logits": 6 * m * D * d, "chunked": 8 * m * D * d, "gram": gram}


def contestants(setting: Setting) -> list[str]:
    """Those that fit in memory and have a chance of being the best, and what auto is."""
    least = min(flops(setting).values())
    fits = 3 * 4 * setting.m * setting.D + 12 * setting.D * setting.d < 14e9
    names = []
    for name, count in flops(setting).items():
        hopeful = count < HOPELESS * least or count < 2e9
        if hopeful and (fits or name not in ("dense", "logits")):
            names.append(name)
    return [*names, "auto"]


def grid() -> None:
    """Goes on where the table ends."""
    names = ("layer", "m", "D", "d", "measure", "value")
    old = [row for row in read(TABLE) if row["part"] == "grid"]
    rows = [{name: row[name] for name in names} for row in old]
    done = {(row["m"], row["D"], row["d"]) for row in rows}
    for D in (100, 10_000, 100_000, 1_000_000):
        for d in (64, 256, 768):
            for m in (1, 16, 64, 256, 1024, 4096):
                if (str(m), str(D), str(d)) not in done:
                    rows += at(Setting(m, D, d))
                    record(TABLE, "grid", rows)


def at(setting: Setting) -> list[dict[str, Any]]:
    """Times of the engines in turn, and those of auto and of plain logits beside them."""
    names = contestants(setting)
    hidden, weight, target = setting.tensors()
    times: dict[str, list[float]] = {name: [] for name in names}

    def run(name: str) -> float:
        def both() -> None:
            hidden.grad = weight.grad = None
            layers[name](hidden, weight, target).backward()

        return seconds(both)

    layers = {name: LAYERS[name]() for name in names}
    longest = max(run(name) for name in names)
    turns = max(9, min(60, int(4 / longest / len(names))))
    order = random.Random(0)
    for _ in range(turns):
        # what one leaves in the caches is not always the same one's
        for name in order.sample(names, len(names)):
            times[name].append(run(name))
    median = {name: statistics.median(taken) for name, taken in times.items()}
    rows = [setting.row(name, "seconds", value) for name, value in median.items()]
    best = min((value, name) for name, value in median.items() if name in ENGINES)
    chosen = choose(setting.m, setting.D, setting.d, torch.float32, "cpu").engine
    rows.append(setting.row("auto", "is", chosen))
    rows.append(setting.row("best", "is", best[1]))
    rows.append(setting.row("auto", "times the best engine", median["auto"] / best[0]))
    if "logits" in median:
        rows.append(setting.row("auto", "times plain logits", median["auto"] / median["logits"]))
    return rows


def accumulate() -> None:
    """Eight micro-batches: as eight losses, and within accumulate()."""
    rows = []
    for m, D, d in ((256, 100_000, 512), (256, 262_144, 256)):
        setting = Setting(m, D, d)
        head = LinearSphericalLoss(d, D, LOSS, options=LinearSphericalOptions(engine="gram"))
        batches = [(torch.randn(m, d), torch.randint(D, (m,))) for _ in range(8)]

        def apart(head: LinearSphericalLoss = head, batches: list[Any] = batches) -> None:
            head.zero_grad()
            for hidden, target in batches:
                (head(hidden, target) / 8).backward()

        def together(head: LinearSphericalLoss = head, batches: list[Any] = batches) -> None:
            head.zero_grad()
            with head.accumulate():
                for hidden, target in batches:
                    (head(hidden, target) / 8).backward()

        apart(), together()
        pairs = [(seconds(apart), seconds(together)) for _ in range(3)]
        ratio = statistics.median(a / b for a, b in pairs)
        rows.append(setting.row("gram", "times faster within accumulate()", ratio))
    record(TABLE, "accumulate", rows)


# Heads of language models and of a recommender: m rows, D classes, width d.
WORKLOADS = {
    "Gemma-2 2B": (8192, 256_000, 2304),
    "Qwen-size": (16384, 248_320, 2048),
    "Llama-3-8B": (32768, 128_256, 4096),
    "GPT-2 small": (16384, 50_304, 768),
    "recommendation": (25600, 1_000_000, 128),
}


def gpu() -> None:
    """bfloat16 forwards and backwards, median of 30 after 8; of 10 after 8 with AdamW's step."""
    if not torch.cuda.is_available():
        raise SystemExit("the gpu part needs a CUDA device")
    rows: list[dict[str, Any]] = []
    for work, (m, D, d) in WORKLOADS.items():
        setting = Setting(m, D, d)
        rate = products_per_second(setting)
        rows += symmetric_products(work, setting)
        for name in ("gram", "triton", *peers.GPU_LAYERS):
            try:
                rows += on_gpu(f"{work}: {name}", name, setting, rate)
            except (RuntimeError, ImportError) as error:  # out of memory, or not installed
                rows.append(setting.row(f"{work}: {name}", "failed", type(error).__name__))
            torch.cuda.empty_cache()
            record(TABLE, "gpu", rows)


def products_per_second(setting: Setting) -> float:
    """The rate of the Gram product alone, as torch does it."""
    weight = torch.randn(setting.D, setting.d, device="cuda", dtype=torch.bfloat16)
    times = [seconds(lambda: weight.mT @ weight, "cuda") for _ in range(20)]
    return 2 * setting.D * setting.d**2 / statistics.median(times[5:])


def symmetric_products(work: str, setting: Setting) -> list[dict[str, Any]]:
    """Q as gram forms it, in blocks of PyTorch's products, and by the Triton kernel."""
    from softsphere.engines import moments, triton

    weight = torch.randn(setting.D, setting.d, device="cuda", dtype=torch.bfloat16)
    ways = {
        "in blocks": lambda: moments.upper_product(weight, weight, torch.float32),
        "by Triton": lambda: triton.symmetric_gram(weight),
    }
    rows = []
    for name, way in ways.items():
        times = [seconds(way, "cuda") for _ in range(20)][5:]
        label = f"{work}: Q {name}"
        rows.append(setting.row(label, "milliseconds", 1e3 * statistics.median(times)))
    return rows


def on_gpu(label: str, name: str, setting: Setting, rate: float) -> list[dict[str, Any]]:
    m, D, d = setting.m, setting.D, setting.d
    layer = (LAYERS | peers.GPU_LAYERS)[name]()
    torch.manual_seed(0)
    target = torch.randint(D, (m,), device="cuda")
    # Peers that skip small blocks are to see trained rows: each leans to its target, so that
    # softmax gives the target much of its mass and the rest has a long tail.
    weight = torch.randn(D, d, device="cuda").div_(math.sqrt(d))
    hidden = torch.randn(m, d, device="cuda") + 8 * weight[target]
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)

    def both() -> None:
        hidden.grad = weight.grad = None
        layer(hidden, weight, target).backward()

    def whole() -> None:
        both()
        optimizer.step()

    both()
    hidden.grad = weight.grad = None
    kept = 2 * (hidden.numel() + weight.numel())
    extra = extra_bytes(both, "cuda") - kept
    times = [seconds(both, "cuda") for _ in range(38)][8:]
    stepped = [seconds(whole, "cuda") for _ in range(18)][8:]
    both()
    rows = [
        setting.row(label, "error of the gradient by hidden", error(name, hidden, weight, target)),
        setting.row(label, "milliseconds", 1e3 * statistics.median(times)),
        setting.row(label, "milliseconds with AdamW", 1e3 * statistics.median(stepped)),
        setting.row(label, "extra MiB", extra / 2**20),
    ]
    if name == "gram":
        share = (4 * D * d * d + 4 * m * d * d) / statistics.median(times) / rate
        rows.append(setting.row(label, "share of the product rate", share))
    return rows


def error(name: str, hidden: Tensor, weight: Tensor, target: Tensor) -> float:
    """Of the first 64 rows, relative to float64."""
    layer = plain if name in LAYERS and name not in peers.LAYERS else peers.softmax
    rows = hidden.detach()[:64].double().requires_grad_()
    layer(rows, weight.detach().double(), target[:64]).backward()
    assert rows.grad is not None and hidden.grad is not None
    exact = rows.grad * len(rows) / len(hidden)
    return float((hidden.grad[:64] - exact).norm() / exact.norm())


def values(part: str) -> dict[tuple[str, ...], str]:
    """Values of the table by (m, D, d, layer, measure)."""
    rows = [row for row in read(TABLE) if row["part"] == part]
    key = ("m", "D", "d", "layer", "measure")
    return {tuple(row[x] for x in key): row["value"] for row in rows}


def page() -> None:
    """The page "which engine", and its picture."""
    grid = values("grid")
    m, D, d = (sorted({int(key[i]) for key in grid}) for i in range(3))
    figure(grid, m, D, d)
    PAGE.write_text(markdown(grid, m, D, d))
    print(PAGE, FIGURE)


def figure(grid: dict[tuple[str, ...], str], m: list[int], D: list[int], d: list[int]) -> None:
    """A map for each D: m across, d up; colour and word for the best engine, number for auto."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    picture = plt.figure(figsize=(11, 6.2), layout="constrained")
    shades = ListedColormap(["#9ecae1", "#fdd0a2", "#a1d99b"])
    for axes, classes in zip(picture.subplots(2, 2).flat, D, strict=True):
        colours = [[math.nan] * len(m) for _ in d]
        for i, width in enumerate(d):
            for j, rows in enumerate(m):
                at = (str(rows), str(classes), str(width))
                if (*at, "best", "is") not in grid:
                    continue
                best = grid[(*at, "best", "is")]
                ratio = float(grid[(*at, "auto", "times the best engine")])
                colours[i][j] = ENGINES.index(best)
                text = f"{best}\n{shown(float(grid[(*at, best, 'seconds')]))}\nauto {ratio:.2f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=7.5)
        axes.imshow(colours, cmap=shades, vmin=0, vmax=2, aspect="auto", origin="lower")
        axes.set_xticks(range(len(m)), [f"{x:,}" for x in m])
        axes.set_yticks(range(len(d)), d)
        axes.set(xlabel="rows m", ylabel="width d")
        axes.set_title(f"{classes:,} classes", fontsize=10)
    title = "The fastest engine, its time forwards and backwards, and how many times that auto took"
    picture.suptitle(title, fontsize=11)
    picture.savefig(FIGURE, dpi=150, metadata={"Software": None})


def markdown(grid: dict[tuple[str, ...], str], m: list[int], D: list[int], d: list[int]) -> str:
    """The page's text: what to take, the measured grid, and how auto did."""
    machine = next(row for row in read(TABLE) if row["part"] == "grid")
    lines = [
        "# Which engine for my m, D and d",
        "",
        "`LinearSphericalLoss` asks `softsphere.engines.choose(m, num_classes, in_features, dtype, "
        "device)`, which",
        "counts FLOPs and memory and says why. Name an engine with "
        "`LinearSphericalOptions(engine=…)`.",
        "",
        "| engine | FLOPs forwards and backwards | memory beyond gradients | take it where |",
        "| --- | --- | --- | --- |",
        "| dense | 6 m D d | 2 m D | D is small, or m well below ⅔ d and the outputs fit |",
        "| chunked | 8 m D d | a tile | m is below ⅔ d and the outputs do not fit |",
        "| triton | 8 m D d | a block of 2²⁵ outputs | the same, on a GPU |",
        "| gram | 4 D d² + 4 m d² | some MiB and d² | m is above ⅔ d and D is large |",
        "",
        "The factored layer (`FactoredSphericalLoss`) has no D in its step at all, for SGD.",
        "",
        f"Measured with log-Taylor softmax in float32 on {machine['machine']}, "
        f"{machine['threads']} threads, torch {machine['torch']}",
        "(`python benchmarks/linear.py grid`, `benchmarks/linear.csv`). An engine was not timed "
        f"where it has more than {HOPELESS} times",
        "the FLOPs of another, or where the outputs would not have fitted in memory. Dense and "
        "logits are",
        "the same work, and so is auto where it is dense: how far they are apart is the noise, "
        "largest where",
        "a gradient has 3 GB, whose pages the system hands out as it can.",
        "",
        "![The fastest engine over m, D and d](../benchmarks/linear.png)",
        "",
    ]
    header = [
        "m",
        "d",
        *(f"{name}, ms" for name in ENGINES),
        "logits, ms",
        "auto is",
        "auto / best",
    ]
    for classes in D:
        lines += [f"## {classes:,} classes", "", row(header), row(["---"] * len(header))]
        for rows in m:
            for width in d:
                at = (str(rows), str(classes), str(width))
                if (*at, "auto", "is") not in grid:
                    continue
                times = [
                    milliseconds(float(value)) if value else "–"
                    for value in (grid.get((*at, x, "seconds")) for x in (*ENGINES, "logits"))
                ]
                ratio = float(grid[(*at, "auto", "times the best engine")])
                auto = [grid[(*at, "auto", "is")], f"{ratio:.2f}"]
                lines.append(row([str(rows), str(width), *times, *auto]))
        lines.append("")
    return "\n".join(lines)


def milliseconds(taken: float) -> str:
    return f"{1e3 * taken:,.0f}" if taken >= 0.1 else f"{1e3 * taken:.3g}"


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def shown(taken: float) -> str:
    if taken >= 1:
        return f"{taken:.2g} s"
    return f"{1e3 * taken:.0f} ms" if taken >= 0.01 else f"{1e3 * taken:.2g} ms"


PARTS = {f.__name__: f for f in (bars, grid, accumulate, gpu, page)}

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["one", job]:
            one(job)
        case [part] if part in PARTS:
            began = time.perf_counter()
            PARTS[part]()
            print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
        case _:
            raise SystemExit(f"usage: python benchmarks/linear.py {'|'.join(PARTS)}")
