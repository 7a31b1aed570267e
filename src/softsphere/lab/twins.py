"""One n-gram model with the factored output layer and with a dense one under the same SGD."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softsphere.heads import FactoredSphericalLoss
from softsphere.lab.records import Record
from softsphere.lab.text import END, Text, ngrams
from softsphere.modules import SphericalLoss
from softsphere.optim import FactoredSGD

__all__ = ["ENGINES", "Plan", "remaining", "run"]

ENGINES = ("factored", "dense")
RUNS = "metrics.jsonl"


@dataclass(frozen=True)
class Plan:
    """The model and its training; lr is that of the output layer as a share of the classes D."""

    dataset: str
    loss: str
    prior: bool
    n: int
    embedding: int
    width: int
    batch_size: int
    epochs: int
    lr: float
    momentum: float
    trunk_lr: float
    seed: int
    device: str
    dtype: str


class DenseTwin(nn.Module):
    """diag(√π) [W b] as one parameter, which is what FactoredSGD steps; with all the logits."""

    def __init__(self, head: FactoredSphericalLoss) -> None:
        super().__init__()
        pi = head.matrix.pi
        self.root = None if pi is None else pi.sqrt().unsqueeze(1)
        W = head.dense()
        self.parameter = nn.Parameter(W if self.root is None else self.root * W)
        self.criterion = SphericalLoss(head.loss, prior=pi)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        W = self.parameter if self.root is None else self.parameter / self.root
        value: Tensor = self.criterion(nn.functional.linear(hidden, W[:, :-1], W[:, -1]), target)
        return value


def trunk(plan: Plan, vocabulary: int) -> nn.Module:
    """Embeddings of the context side by side, and two ReLU layers."""
    return nn.Sequential(
        nn.Embedding(vocabulary, plan.embedding),
        nn.Flatten(),
        nn.Linear((plan.n - 1) * plan.embedding, 2 * plan.width),
        nn.ReLU(),
        nn.Linear(2 * plan.width, plan.width),
        nn.ReLU(),
    )


def mean_loss(model: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> float:
    """Over all n-grams."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for part, target in zip(torch.split(x, 1024), torch.split(y, 1024), strict=True):
            total += float(head(model(part), target)) * len(target)
    return total / len(y)


def run(
    plan: Plan, engine: str, text: Text, record: Record, on_step: Callable[[int, int, int], None]
) -> None:
    """Trains with one engine and adds the run to the record, whole."""
    torch.manual_seed(plan.seed)
    D, device, dtype = len(text.words), plan.device, getattr(torch, plan.dtype)
    # drawn in float32 whatever the dtype, so that runs in both begin with the same weights
    model = trunk(plan, D).to(device, dtype)
    first = nn.Linear(plan.width, D)
    prior = text.counts if plan.prior else None
    head: nn.Module = FactoredSphericalLoss(
        plan.width, D, plan.loss, prior=prior, device=device, dtype=dtype
    )
    head.load_state_dict(first.state_dict(), strict=False)
    lr = plan.lr * D
    layer: torch.optim.Optimizer
    if engine == "factored":
        assert isinstance(head, FactoredSphericalLoss)
        layer = FactoredSGD([head], lr=lr, momentum=plan.momentum)
    else:
        assert isinstance(head, FactoredSphericalLoss)
        head = DenseTwin(head).to(device)
        layer = torch.optim.SGD(head.parameters(), lr=lr, momentum=plan.momentum)
    rest = torch.optim.SGD(model.parameters(), lr=plan.trunk_lr, momentum=0.9)
    end = text.words.index(END)
    parts = {
        name: [x.to(device) for x in ngrams(getattr(text, name), plan.n, end)]
        for name in ("train", "valid", "test")
    }
    x, y = parts["train"]
    order = torch.Generator().manual_seed(plan.seed)
    lines = []
    for epoch in range(1, plan.epochs + 1):
        model.train()
        batches = torch.split(torch.randperm(len(y), generator=order), plan.batch_size)
        seconds = 0.0
        total = torch.zeros((), dtype=torch.float64, device=device)
        for step, index in enumerate(batches, 1):
            start = time.perf_counter()
            index = index.to(device)
            loss = head(model(x[index]), y[index])
            rest.zero_grad(set_to_none=True)
            layer.zero_grad(set_to_none=True)
            loss.backward()
            rest.step()
            layer.step()
            total += loss.detach() * len(index)
            seconds += time.perf_counter() - start
            on_step(epoch, step, len(batches))
        lines.append(
            {
                "engine": engine,
                "epoch": epoch,
                "train_loss": float(total) / len(y),
                "valid_loss": mean_loss(model, head, *parts["valid"]),
                "step_seconds": seconds / len(batches),
            }
        )
    final = {"engine": engine, "final": {"test_loss": mean_loss(model, head, *parts["test"])}}
    if isinstance(head, FactoredSphericalLoss):
        final["health"] = asdict(head.health())
    record.add(RUNS, [*lines, final])


def remaining(record: Record) -> Iterator[str]:
    """The engines that are not finished."""
    done = {line["engine"] for line in record.lines(RUNS) if "final" in line}
    return (engine for engine in ENGINES if engine not in done)


def table(lines: list[dict[str, Any]], normalised: bool) -> list[tuple[str, ...]]:
    """Header and a row an engine: validation loss or perplexity by epoch, test, step time."""

    def shown(loss: float) -> str:
        return f"{math.exp(loss):.3f}" if normalised else f"{loss:.6f}"

    epochs = sorted({line["epoch"] for line in lines if "epoch" in line})
    header = ("engine", *(f"epoch {e}" for e in epochs), "test", "ms a step")
    rows = [header]
    for engine in ENGINES:
        own = {
            line["epoch"]: line for line in lines if line["engine"] == engine and "epoch" in line
        }
        final = [line for line in lines if line["engine"] == engine and "final" in line]
        if not final:
            continue
        milliseconds = 1000 * sum(own[e]["step_seconds"] for e in epochs) / len(epochs)
        rows.append(
            (
                engine,
                *(shown(own[e]["valid_loss"]) for e in epochs),
                shown(final[0]["final"]["test_loss"]),
                f"{milliseconds:.2f}",
            )
        )
    return rows
