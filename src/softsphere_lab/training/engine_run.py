"""One run of a language model whose output layer is computed by one of several engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softsphere_lab.training.capturing import TIMED
from softsphere_lab.training.run import Run
from softsphere_lab.training.text_parts import Examples
from softsphere_lab.training.whole_model import WholeModel

__all__ = ["EngineEpoch", "EngineFinal", "EngineRun"]


@dataclass(frozen=True)
class EngineEpoch:
    """Metrics after one pass over the text. step_seconds: the mean of a whole training step."""

    epoch: int
    train_loss: float
    valid_loss: float
    step_seconds: float


@dataclass(frozen=True)
class EngineFinal:
    """The end of a run. test_loss: of the last epoch. health: of a factored matrix, else None."""

    test_loss: float | None
    health: dict[str, float] | None
    diverged: bool


class EngineRun(Run[EngineEpoch]):
    """A model and its output layer under training, each with its own optimizer or one for both."""

    epoch_type = EngineEpoch

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.head, self.examples = model, head, examples
        self.both = WholeModel(model, head)
        _, y = examples["train"]
        super().__init__(
            {"model": model, "head": head},
            optimizers,
            lambda step: 1.0,
            rows=len(y),
            batch_size=batch_size,
            seed=seed,
            device=y.device,
            obstacle=TIMED,
        )

    def loss_of(self, index: Tensor, *drawn: Tensor) -> Tensor:
        x, y = self.examples["train"]
        return self.both.loss(x[index], y[index])

    def look(
        self, epoch: int, train_loss: float, seconds: float
    ) -> tuple[EngineEpoch, float] | None:
        valid = self.loss_on("valid")
        steps = -(-self.rows // self.batch_size)
        return EngineEpoch(epoch, train_loss, valid, seconds / steps), valid

    def loss_on(self, part: str) -> float:
        """Returns the mean loss on a part of the text, with the weights as they are."""
        return self.both.mean_loss(*self.examples[part])
