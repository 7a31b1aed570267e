"""One run: a network, a loss and a seed, which decides the initial weights and the data order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softsphere.criteria import SphericalLoss
from softsphere.losses import Loss
from softsphere_lab.data.augment import draw_moves, moved
from softsphere_lab.data.images import Images, Split
from softsphere_lab.models.image_networks import build
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.training.rates import cosine
from softsphere_lab.training.run import Run

__all__ = ["Epoch", "Final", "Schedule", "train"]


@dataclass(frozen=True)
class Schedule:
    """How a network is trained: by AdamW, whose rate falls along a cosine after a warm-up.

    warm_up: the share of the steps in which the rate rises. weight_decay: of matrices and filters,
    not of vectors. augment: whether training images are shifted and mirrored at random. bfloat16:
    whether all layers but the last compute in bfloat16.
    """

    model: str
    epochs: int
    batch_size: int
    device: str
    warm_up: float = 0.0
    weight_decay: float = 0.0
    augment: bool = False
    bfloat16: bool = False


@dataclass(frozen=True)
class Epoch:
    """Metrics after one pass. Errors are shares of the images; nll is None without a likelihood."""

    epoch: int
    train_loss: float
    valid_error: float
    valid_nll: float | None
    seconds: float


@dataclass(frozen=True)
class Final:
    """The end of a run, with the weights of the epoch that was best on validation data."""

    best_epoch: int
    valid_error: float
    mean_valid_error: float
    test_error: float | None
    test_nll: float | None
    seconds: float
    diverged: bool


class _Network(nn.Module):
    """A network on the device of a schedule, whose last layer always computes in float32."""

    def __init__(self, schedule: Schedule, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.layers = build(schedule.model, shape, num_classes)
        self.device_type = torch.device(schedule.device).type
        self.autocast = schedule.bfloat16
        # convolutions are fastest with the channels innermost
        self.to(schedule.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.autocast):
            hidden: Tensor = self.layers[:-1](x.contiguous(memory_format=torch.channels_last))
        outputs: Tensor = self.layers[-1](hidden.float())
        return outputs


def _evaluate(
    model: nn.Module, criterion: SphericalLoss, part: Split
) -> tuple[float, float | None]:
    """The error and the mean negative log-likelihood, which is None without probabilities."""
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


def _adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without decay of vectors, which are biases and scales and would only suffer from it."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # the same steps in fewer operations, a fifth of the time of a small network
    return torch.optim.AdamW(groups, lr=lr, fused=True)


class _ClassifierRun(Run[Epoch]):
    """A network and its criterion under training."""

    epoch_type = Epoch

    def __init__(self, data: Images, loss: Loss, lr: float, seed: int, schedule: Schedule) -> None:
        torch.manual_seed(seed)
        self.data, self.schedule = data, schedule
        self.model = _Network(schedule, data.shape, data.num_classes)
        self.criterion = SphericalLoss(loss)
        steps = schedule.epochs * math.ceil(len(data.train) / schedule.batch_size)
        super().__init__(
            {"model": self.model},
            [_adamw(self.model, lr, schedule.weight_decay)],
            lambda step: cosine(step, steps, schedule.warm_up),
            rows=len(data.train),
            batch_size=schedule.batch_size,
            seed=seed,
            device=data.train.x.device,
        )

    def draw(self, rows: int) -> tuple[Tensor, ...]:
        return (draw_moves(rows, self.order),) if self.schedule.augment else ()

    def loss_of(self, index: Tensor, *drawn: Tensor) -> Tensor:
        batch = self.data.train.take(index)
        x = moved(batch.x, drawn[0]) if drawn else batch.x
        loss: Tensor = self.criterion(self.model(x), batch.y)
        return loss

    def look(self, epoch: int, train_loss: float, seconds: float) -> tuple[Epoch, float]:
        error, nll = _evaluate(self.model, self.criterion, self.data.valid)
        return Epoch(epoch, train_loss, error, nll, seconds), error

    def final(self, read_test: bool) -> Final:
        """Returns the end of the run, with the weights of the best epoch."""
        self.put(self.kept)
        test_error, test_nll = (
            _evaluate(self.model, self.criterion, self.data.test) if read_test else (None, None)
        )
        errors = [epoch.valid_error for epoch in self.history] or [1.0]
        return Final(
            best_epoch=self.best_epoch,
            valid_error=min(errors),
            mean_valid_error=sum(errors) / len(errors),
            test_error=test_error,
            test_nll=test_nll,
            seconds=sum(epoch.seconds for epoch in self.history),
            diverged=self.diverged,
        )


def train(
    data: Images,
    loss: Loss,
    lr: float,
    seed: int,
    schedule: Schedule,
    *,
    read_test: bool,
    kept: Checkpoint | None = None,
    on_epoch: Callable[[int, int], None] = lambda *_: None,
) -> tuple[list[Epoch], Final]:
    """Trains one network. Returns all epochs, and the end with the lowest validation error.

    A run whose loss is no longer finite has diverged, and ends with its best epoch before.

    read_test: whether the test set is looked at. kept: where the state of an unfinished run is
    written to and read from. on_epoch: called with the number of the epoch and of all epochs.
    """
    run = _ClassifierRun(data, loss, lr, seed, schedule)
    run.train(schedule.epochs, kept or Checkpoint(), on_epoch)
    return run.history, run.final(read_test)
