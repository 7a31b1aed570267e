"""A training run that can be stopped after any step and resumed as if it had not been."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from softsphere.matrix import SingularStepError
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.training.capturing import Steps
from softsphere_lab.training.passes import Pass

__all__ = ["Run"]

# A run that was stopped may have to repeat at most STEPS steps of a long epoch, and writing a large
# state takes little beside them. Short epochs are kept only once they have FEWEST_STEPS together,
# since writing the state would take longer than they do. Both count steps: by the clock, the state
# would be kept at other steps each time, and keeping it changes the last digits of a factored one.
STEPS, FEWEST_STEPS = 500, 100
# A captured step takes so little time that as many steps count as one.
CAPTURED = 20

E = TypeVar("E")


class Run(ABC, Generic[E]):
    """Modules under training, with the best epoch on validation data and all it takes to resume.

    E, epoch_type: a dataclass of the metrics of an epoch.
    """

    epoch_type: ClassVar[type]

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        rate: Callable[[int], float],
        *,
        rows: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        obstacle: str | None = None,
        shuffled: bool = True,
    ) -> None:
        """Makes the schedules of the optimizers; each step of theirs is one of all of them.

        rate: returns the factor of the learning rates in a step. rows: how many to train on.
        obstacle: why a step cannot be captured as a CUDA graph, if so. shuffled: whether the rows
        come in another random order in each epoch; otherwise they come in that of their numbers.
        """
        self.modules, self.optimizers, self.rate = modules, optimizers, rate
        self.rates = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
        self.rows, self.batch_size, self.device = rows, batch_size, device
        self.shuffled = shuffled
        self.order = torch.Generator().manual_seed(seed)
        self.under_way: Pass | None = None
        self.history: list[E] = []
        self.best, self.best_epoch, self.kept = math.inf, 0, copy.deepcopy(self.weights())
        self.diverged = False
        self.steps = Steps(optimizers, device, batch_size, obstacle)

    @property
    def stretch(self) -> int:
        """How many steps of a long epoch are taken before the state is kept."""
        return STEPS * (CAPTURED if self.steps.captures else 1)

    def draw(self, rows: int) -> tuple[Tensor, ...]:
        """Returns what is drawn on the CPU for a step, a row for each row of the batch."""
        return ()

    @abstractmethod
    def loss_of(self, index: Tensor, *drawn: Tensor) -> Tensor:
        """Returns the mean loss of the training rows with those numbers.

        drawn: what `draw` returned, on the device. It reads no value on the device, unless the run
        has an obstacle.
        """

    def before_epoch(self) -> None:
        """Is called before the first step of an epoch."""

    def before_step(self) -> None:
        """Is called between the gradients and the step that they make; it may change them."""

    @abstractmethod
    def look(self, epoch: int, train_loss: float, seconds: float) -> tuple[E, float] | None:
        """Returns an epoch and how bad it is on validation data, or None if it diverged."""

    def train(
        self, epochs: int, kept: Checkpoint, on_epoch: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Trains to the last epoch, or until it diverges, from the state that is kept if any.

        The state is kept after each epoch, in a long one after every STEPS steps, and of short ones
        after the first that ends FEWEST_STEPS steps after the last that was kept. If steps are
        captured, both are CAPTURED times as many.
        """
        if state := kept.load():
            self.resume(state)
        since_kept = 0

        def after_step(step: int) -> None:
            nonlocal since_kept
            since_kept += 1
            if step % self.stretch == 0:
                kept.save(self.state())

        try:
            while len(self.history) < epochs:
                self.epoch(after_step)
                if self.diverged:
                    return
                if since_kept >= FEWEST_STEPS * self.stretch // STEPS:
                    kept.save(self.state())
                    since_kept = 0
                on_epoch(len(self.history), epochs)
        finally:
            self.steps.release()

    def epoch(self, after_step: Callable[[int], None]) -> None:
        """Trains on what is left of a pass over the rows, and looks at the validation part.

        The run has diverged if its loss is not finite or `look` returns None.
        """
        if self.under_way is None:
            self.before_epoch()
            self.under_way = Pass.begin(self._row_order(), self.device)
        under_way = self.under_way
        for module in self.modules.values():
            module.train()

        def take_step(index: Tensor) -> Tensor:
            inputs = (index, *self.draw(len(index)))
            return self.steps(
                self._step, *(each.to(self.device, non_blocking=True) for each in inputs)
            )

        def stepped(step: int) -> None:
            for rate in self.rates:
                rate.step()
            after_step(step)

        try:
            under_way.train(self.batch_size, take_step, stepped, self.stretch)
            self.steps.check()
        except SingularStepError:
            self.diverged = True
            return
        self.under_way = None
        seen = None
        if math.isfinite(under_way.loss):
            seen = self.look(len(self.history) + 1, under_way.loss, under_way.seconds)
        if seen is None:
            self.diverged = True
            return
        epoch, badness = seen
        self.history.append(epoch)
        if badness < self.best:
            self.best, self.best_epoch = badness, len(self.history)
            self.kept = copy.deepcopy(self.weights())

    def _row_order(self) -> Tensor:
        """Returns the numbers of the rows in the order in which an epoch reads them."""
        if self.shuffled:
            return torch.randperm(self.rows, generator=self.order)
        return torch.arange(self.rows)

    def _step(self, index: Tensor, *drawn: Tensor) -> Tensor:
        """Trains on a batch and returns its loss.

        A captured step knows memory alone: whatever differs from step to step is in the arguments,
        in the tensors of the learning rates, or drawn by the generator of the device.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(index, *drawn)
        loss.backward()
        self.before_step()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def weights(self) -> dict[str, Any]:
        """Returns the weights as they are now, not copied."""
        return {name: module.state_dict() for name, module in self.modules.items()}

    def put(self, weights: Mapping[str, Any]) -> None:
        """Sets all weights to those that `weights` returned."""
        for name, module in self.modules.items():
            module.load_state_dict(weights[name])

    def state(self) -> dict[str, Any]:
        """Returns what `resume` takes. Raises SingularStepError if a step was left out before."""
        self.steps.check()
        rates = [
            [float(base) * self.rate(each.last_epoch) for base in each.base_lrs]
            for each in self.rates
        ]
        return {
            "now": self.weights(),
            "optimizers": self.steps.states(rates),
            "rates": [
                {**each.state_dict(), "_last_lr": its}
                for each, its in zip(self.rates, rates, strict=True)
            ],
            "order": self.order.get_state(),
            "under way": self.under_way and self.under_way.state(),
            "history": [asdict(epoch) for epoch in self.history],  # type: ignore[call-overload]
            "best": self.best,
            "best_epoch": self.best_epoch,
            "kept": self.kept,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state."""
        self.put(state["now"])
        for optimizer, its in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        for rate, its in zip(self.rates, state["rates"], strict=True):
            rate.load_state_dict(its)
        self.steps.place_rates()
        self.order.set_state(state["order"])
        if state["under way"]:
            self.under_way = Pass.again(state["under way"], self.device)
        self.history = [self.epoch_type(**epoch) for epoch in state["history"]]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.kept = state["kept"]
