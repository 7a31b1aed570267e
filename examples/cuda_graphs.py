"""A GPU repeats a training step with a factored layer as one CUDA graph.

python examples/cuda_graphs.py           # some seconds on a CPU, which captures nothing
python examples/cuda_graphs.py --full    # a million classes

A step of a factored layer launches nearly 200 short operations, and a graph launches them at once.
Needs nothing but softsphere.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

# Ctrl-C ends the program with a sentence, also during the imports below.
signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped by Ctrl-C."))

import torch
from torch import Tensor, nn

from softsphere import CapturedStep, FactoredSphericalLoss
from softsphere.optim import FactoredSGD


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="a million classes, 512 features")
    full = parser.parse_args().full
    width, num_classes, rows = (512, 1_000_000, 256) if full else (32, 10_000, 32)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trunk = nn.Linear(width, width, device=device)
    head = FactoredSphericalLoss(width, num_classes, device=device)
    optimizer = FactoredSGD(
        [
            {"params": head.parameters(), "lr": 0.01 * num_classes},
            {"params": trunk.parameters(), "algorithm": "adamw", "lr": 1e-3},
        ],
        capturable=True,
    )

    def train(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = head(trunk(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = [
        (torch.randn(rows, width, device=device), torch.randint(100, (rows,), device=device))
        for _ in range(20)
    ]
    step = CapturedStep(train, optimizer, *batches[0])
    if device == "cpu":
        print("There is no GPU, so a CapturedStep takes each step eagerly.")
    for name, run in (("eagerly", train), ("by CapturedStep", step)):
        for k in range(10):  # the first steps warm up, and capture
            loss = run(*batches[k])
        loss.item()  # waits for the device
        begun = time.perf_counter()
        for k in range(50):
            loss = run(*batches[k % len(batches)])
        last = loss.item()
        each = 1000 * (time.perf_counter() - begun) / 50
        print(f"{device}, a step taken {name}: {each:.2f} ms, loss {last:.2f}")
    print(f"graphs captured: {step.captures}")


if __name__ == "__main__":
    main()
