"""One LSTM under AdamW with the linear output layer by each of its engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from softsphere.engines.options import LinearSphericalOptions
from softsphere.heads import LinearSphericalLoss
from softsphere_lab.data.text import Text
from softsphere_lab.training import language

__all__ = ["Plan", "engines", "run"]


@dataclass(frozen=True)
class Plan:
    """The model and its training."""

    dataset: str
    loss: str
    prior: bool
    length: int
    embedding: int
    width: int
    batch_size: int
    epochs: int
    lr: float
    seed: int
    device: str
    dtype: str


def engines(device: str) -> tuple[str, ...]:
    """Those that run there, the reference last."""
    on_gpu = ("triton",) if torch.device(device).type == "cuda" else ()
    return (*on_gpu, "gram", "chunked", "dense")


def run(plan: Plan, engine: str, text: Text, on_step: language.OnStep) -> list[dict[str, Any]]:
    """Trains with one engine: a line for each epoch and one for the end."""
    torch.manual_seed(plan.seed)
    D, device, dtype = len(text.words), plan.device, getattr(torch, plan.dtype)
    # drawn in float32 whatever the dtype, so that runs in both begin with the same weights
    model = language.LSTM(D, plan.embedding, plan.width).to(device, dtype)
    linear = torch.nn.Linear(plan.width, D).to(device, dtype)
    head = LinearSphericalLoss.from_linear(
        linear,
        plan.loss,
        prior=text.counts.to(dtype) if plan.prior else None,
        options=LinearSphericalOptions(engine=engine),
    ).to(device)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=plan.lr)
    lines, test_loss = language.fit(
        model,
        head,
        [optimizer],
        language.window_parts(text, plan.length, device),
        batch_size=plan.batch_size,
        epochs=plan.epochs,
        seed=plan.seed,
        on_step=on_step,
    )
    return [*lines, {"final": {"test_loss": test_loss}}]
