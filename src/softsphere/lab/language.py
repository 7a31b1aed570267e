"""Language models without their output layer, and the training of one with a given layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from softsphere.lab.text import Text, ngrams, windows

__all__ = ["LSTM", "Examples", "OnStep", "fit", "mean_loss", "mlp", "ngram_parts", "window_parts"]

# Contexts and the words that follow, of each part of a text.
Examples = dict[str, tuple[Tensor, Tensor]]
# Told the epoch, the step and the steps of an epoch.
OnStep = Callable[[int, int, int], None]
PARTS = ("train", "valid", "test")


def ngram_parts(text: Text, n: int, device: str) -> Examples:
    """n-grams: contexts (N, n − 1) and the next word of each (N)."""
    return {
        name: tuple(x.to(device) for x in ngrams(getattr(text, name), n, text.end))  # type: ignore[misc]
        for name in PARTS
    }


def window_parts(text: Text, length: int, device: str) -> Examples:
    """Windows of text (N, length) and the next word at each of their places (N, length)."""
    return {
        name: tuple(x.to(device) for x in windows(getattr(text, name), length, text.end))  # type: ignore[misc]
        for name in PARTS
    }


def mlp(vocabulary: int, context: int, embedding: int, width: int) -> nn.Module:
    """Embeddings of the context side by side, and two ReLU layers: (…, context) → (…, width)."""
    return nn.Sequential(
        nn.Embedding(vocabulary, embedding),
        nn.Flatten(),
        nn.Linear(context * embedding, 2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, width),
        nn.ReLU(),
    )


class LSTM(nn.Module):
    """An LSTM over windows that each begin at rest: (N, length) → (N, length, width)."""

    def __init__(self, vocabulary: int, embedding: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.layer = nn.LSTM(embedding, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(self.embedding(x))[0]
        return hidden


def clock(device: torch.device) -> float:
    """Seconds, once a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def mean_loss(model: nn.Module, head: nn.Module, x: Tensor, y: Tensor) -> float:
    """Over all words of y."""
    model.eval()
    head.eval()
    total = 0.0
    size = max(1, 1024 * len(y) // y.numel())
    with torch.no_grad():
        for part, target in zip(torch.split(x, size), torch.split(y, size), strict=True):
            total += float(head(model(part), target)) * target.numel()
    return total / y.numel()


def fit(
    model: nn.Module,
    head: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    examples: Examples,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    on_step: OnStep,
) -> tuple[list[dict[str, Any]], float]:
    """Trains, and gives a line for each epoch and the loss on the test part."""
    x, y = examples["train"]
    order = torch.Generator().manual_seed(seed)
    lines = []
    for epoch in range(1, epochs + 1):
        model.train()
        head.train()
        batches = torch.split(torch.randperm(len(y), generator=order), batch_size)
        seconds = 0.0
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for step, index in enumerate(batches, 1):
            start = clock(x.device)
            index = index.to(x.device)
            loss = head(model(x[index]), y[index])
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total += loss.detach() * len(index)
            seconds += clock(x.device) - start
            on_step(epoch, step, len(batches))
        lines.append(
            {
                "epoch": epoch,
                "train_loss": float(total) / len(y),
                "valid_loss": mean_loss(model, head, *examples["valid"]),
                "step_seconds": seconds / len(batches),
            }
        )
    return lines, mean_loss(model, head, *examples["test"])
