"""One run: a network, a loss, a seed. The same initial weights and data order for every loss."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from softsphere.lab.data import Images, Split
from softsphere.lab.models import build
from softsphere.losses import Loss
from softsphere.modules import SphericalLoss

__all__ = ["Epoch", "Final", "Schedule", "train"]


@dataclass(frozen=True)
class Schedule:
    """How long and how: Adam, its rate falling to zero along a cosine."""

    model: str
    epochs: int
    batch_size: int
    device: str


@dataclass(frozen=True)
class Epoch:
    """Metrics after one pass; error is a share of the examples, nll None without a likelihood."""

    epoch: int
    train_loss: float
    valid_error: float
    valid_nll: float | None
    seconds: float


@dataclass(frozen=True)
class Final:
    """What a run ends with: the test set, read once, at the epoch best on validation data."""

    best_epoch: int
    valid_error: float
    mean_valid_error: float
    test_error: float | None
    test_nll: float | None
    seconds: float
    diverged: bool


def evaluate(model: nn.Module, criterion: SphericalLoss, part: Split) -> tuple[float, float | None]:
    """Error and, for a distribution, mean negative log-likelihood."""
    model.eval()
    wrong, nll = 0, 0.0
    with torch.no_grad():
        for x, y in zip(torch.split(part.x, 1024), torch.split(part.y, 1024), strict=True):
            logits = model(x)
            wrong += int((criterion.predict(logits) != y).sum())
            if criterion.loss.normalised:
                chosen = criterion.log_prob(logits).gather(1, y.unsqueeze(1))
                nll -= float(chosen.double().sum())
    return wrong / len(part), nll / len(part) if criterion.loss.normalised else None


def train(
    data: Images,
    loss: Loss,
    lr: float,
    seed: int,
    schedule: Schedule,
    *,
    read_test: bool,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> tuple[list[Epoch], Final]:
    """Trains one network; the epoch with the lowest validation error is the one that counts.

    A loss that stops being finite ends the run as diverged, with what was best before.
    """
    torch.manual_seed(seed)
    model = build(schedule.model, data.shape, data.num_classes).to(schedule.device)
    criterion = SphericalLoss(loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    batches = math.ceil(len(data.train) / schedule.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.epochs * batches)
    order = torch.Generator().manual_seed(seed)
    history: list[Epoch] = []
    best, kept, diverged = math.inf, copy.deepcopy(model.state_dict()), False
    for number in range(1, schedule.epochs + 1):
        start, total = time.perf_counter(), 0.0
        model.train()
        shuffled = torch.randperm(len(data.train), generator=order)
        for index in torch.split(shuffled, schedule.batch_size):
            batch = data.train.take(index.to(schedule.device))
            value = criterion(model(batch.x), batch.y)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            cosine.step()
            total += float(value.detach()) * len(index)
        seconds = time.perf_counter() - start
        error, nll = evaluate(model, criterion, data.valid)
        epoch = Epoch(number, total / len(data.train), error, nll, seconds)
        if not math.isfinite(epoch.train_loss):
            diverged = True
            break
        history.append(epoch)
        on_epoch(epoch)
        if error < best:
            best, kept = error, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    test_error, test_nll = evaluate(model, criterion, data.test) if read_test else (None, None)
    errors = [epoch.valid_error for epoch in history] or [1.0]
    final = Final(
        best_epoch=errors.index(min(errors)) + 1 if history else 0,
        valid_error=min(errors),
        mean_valid_error=sum(errors) / len(errors),
        test_error=test_error,
        test_nll=test_nll,
        seconds=sum(epoch.seconds for epoch in history),
        diverged=diverged,
    )
    return history, final
