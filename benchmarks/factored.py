"""What does a training step of the factored layer cost, beside other output layers?

    python benchmarks/factored.py papers    # the papers' settings against softmax, core and others
    python benchmarks/factored.py flat      # D = 10⁷ against D = 10⁴, m = d = 128
    python benchmarks/factored.py products  # against the matrix products that it cannot do without
    python benchmarks/factored.py wear      # squared error over 10,000 steps
    python benchmarks/factored.py memory    # peak memory of steps, mending, saving and loading

Everything is counted: forward, backward, update, mending; only ratios of one run mean anything.
A part replaces its rows in benchmarks/factored.csv (with machine and versions). Each layer is timed
in a process of its own, the median of its steps after warm-up. Step times of all layers against D
are an experiment: `softsphere reproduce scaling`.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import Peak
from measure import record as replace_part

from softsphere_lab.timing.layers import CORE, FACTORED, LAYERS, Setting, factored, obstacle
from softsphere_lab.timing.processes import measure

TABLE = Path(__file__).with_name("factored.csv")
PAPERS = (Setting(793_471, 512, 200), Setting(800_000, 300, 128))
CHUNKS = (25, 50, 100, 200)


def record(part: str, rows: list[tuple[str, Setting, str, float]]) -> None:
    """Replaces a part's rows in the table, and prints them."""
    for layer, setting, what, value in rows:
        print(
            f"{layer:34s} D={setting.D:<9d} d={setting.d:<4d} m={setting.m:<4d} {what}: {value:.4g}"
        )
    names = ("layer", "D", "d", "m", "measure", "value")
    values = ((layer, s.D, s.d, s.m, what, f"{x:.6g}") for layer, s, what, x in rows)
    replace_part(TABLE, part, [dict(zip(names, row, strict=True)) for row in values])


def lacks(name: str, setting: Setting) -> bool:
    """Whether a layer is left out, which is said."""
    reason = obstacle(name, setting)
    if reason is not None:
        print(f"{name}, D = {setting.D:,}: left out, {reason}")
    return reason is not None


def papers() -> None:
    rows = []
    for setting in PAPERS:
        ours = measure(FACTORED, setting)
        rows.append((FACTORED, setting, "seconds", ours))
        for name in LAYERS:
            if name in (FACTORED, CORE) or lacks(name, setting):
                continue
            seconds = measure(name, setting)
            rows.append((name, setting, "seconds", seconds))
            rows.append((name, setting, "times ours", seconds / ours))
        if lacks(CORE, setting):
            continue
        best, chunk = min((measure(CORE, setting, c), c) for c in CHUNKS)
        rows.append((f"{CORE}, chunk {chunk}", setting, "seconds", best))
        rows.append((f"{CORE}, chunk {chunk}", setting, "times ours", best / ours))
    record("papers", rows)


def flat() -> None:
    few, many = Setting(10_000, 128, 128), Setting(10_000_000, 128, 128)
    name = FACTORED
    pairs = [(measure(name, few), measure(name, many)) for _ in range(3)]
    ratio = statistics.median(b / a for a, b in pairs)
    rows = [
        (name, few, "seconds", statistics.median(a for a, _ in pairs)),
        (name, many, "seconds", statistics.median(b for _, b in pairs)),
        (name, many, "times that at D = 10,000", ratio),
    ]
    record("flat", rows)


def products() -> None:
    """Seven products of m d², five of m² d: H Q, V_t U, U Lᵀ, (U Lᵀ)R, R U⁻¹, LᵀN, RᵀZ; S, JJ, …"""
    rows = []
    for setting in PAPERS:
        m, d = setting.m, setting.d
        H, Q, K = torch.randn(m, d), torch.randn(d, d), torch.randn(m, m)

        def bare(H: torch.Tensor = H, Q: torch.Tensor = Q, K: torch.Tensor = K) -> None:
            H @ Q, H @ Q, Q @ H.T, H @ Q
            H.T @ H, H.T @ H, H.T @ H
            H @ H.T, H @ H.T, H @ H.T, K @ H, K @ H

        step = factored(setting)
        generator = torch.Generator().manual_seed(0)
        ours, alone = [], []
        for turn in range(60):
            batch = setting.batch(generator)
            start = time.perf_counter()
            step(*batch)
            middle = time.perf_counter()
            bare()
            if turn >= 10:
                ours.append(middle - start)
                alone.append(time.perf_counter() - middle)
        name = FACTORED
        rows.append((name, setting, "milliseconds", 1e3 * statistics.median(ours)))
        rows.append(("its products alone", setting, "milliseconds", 1e3 * statistics.median(alone)))
        ratio = statistics.median(a / b for a, b in zip(ours, alone, strict=True))
        rows.append((name, setting, "times its products", ratio))
    record("products", rows)


def wear() -> None:
    """Ten thousand steps of the squared error, mending included, a thousand at a time."""
    setting = Setting(793_471, 512, 200)
    step = factored(setting, "squared_error")
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1, setting.d)
    step(*setting.batch(generator))  # Q is made from W in the first step
    thousands = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(1000):
            hidden, target = setting.batch(generator)
            step(hidden.detach().mul_(scale).requires_grad_(), target)
        thousands.append((time.perf_counter() - start) / 1000)
        print(f"{1e3 * thousands[-1]:.2f} ms a step", flush=True)
    health = step.head.health(1)
    name = "factored squared error"
    record(
        "wear",
        [
            (name, setting, "milliseconds, first thousand", 1e3 * thousands[0]),
            (name, setting, "milliseconds, slowest thousand", 1e3 * max(thousands)),
            (name, setting, "slowest over first", max(thousands) / thousands[0]),
            (name, setting, "renewed", health.renewed),
            (name, setting, "refactorised", health.refactorised),
            (name, setting, "drift of Q at the end", health.gram_drift),
            (name, setting, "seconds of mending", health.seconds),
            (name, setting, "condition at the end", health.condition),
        ],
    )


def memory() -> None:
    """Peak memory beyond that of an import, in sizes of W."""
    setting = Setting(2_000_000, 256, 128)
    size = 4 * setting.D * setting.d
    name = FACTORED
    peak = Peak()
    step = factored(setting)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step(*setting.batch(generator))
    rows = [(name, setting, "peak over W, steps", peak.over(size))]
    head = step.head
    for _ in range(20):
        head.matrix.renew_()
        step(*setting.batch(generator))
    head.matrix.refactorise_()
    rows.append((name, setting, "peak over W, and mending", peak.over(size)))
    path = Path(tempfile.gettempdir()) / f"softsphere-{os.getpid()}.pt"
    try:
        torch.save(head.state_dict(), path)
        rows.append((name, setting, "peak over W, and saving", peak.over(size)))
        state = torch.load(path, mmap=True)
        head.load_state_dict(state)
        rows.append((name, setting, "peak over W, and loading", peak.over(size)))
    finally:
        path.unlink(missing_ok=True)
    record("memory", rows)


PARTS = {f.__name__: f for f in (papers, flat, products, wear, memory)}

if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in PARTS:
        PARTS[sys.argv[1]]()
    else:
        raise SystemExit(f"usage: python benchmarks/factored.py {'|'.join(PARTS)}")
