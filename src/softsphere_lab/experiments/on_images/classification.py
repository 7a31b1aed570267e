"""Softmax and its alternatives on one set of images: the same network, epochs and rates for each.

A loss that has numbers of its own (such as ε) can have them searched for too; its search then has
more trials than the others'.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from softsphere_lab.data import images as data
from softsphere_lab.data.images import Images
from softsphere_lab.models import image_networks
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Line
from softsphere_lab.study.protocol import OnEpoch, Study, Task
from softsphere_lab.study.search import Axis, Space
from softsphere_lab.study.spec import LossSpec, axes_config
from softsphere_lab.training.image_run import Epoch, Final, Schedule, train

__all__ = ["RATES", "Classification"]

RATES = Axis((1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), 1e-3)
FIXED = Axis.fixed(RATES.start)


@dataclass(frozen=True)
class Classification(Study):
    """Losses compared on one set of images.

    rates: the learning rates that the search may try. tune: whether a loss's own numbers are
    searched for too. trial_epochs: the epochs of a trial, whose rate falls to zero as that of a
    final run does. second_look: whether the rates about the best are then tried in runs as long as
    final ones.
    """

    dataset: str
    losses: tuple[LossSpec, ...]
    seeds: tuple[int, ...]
    schedule: Schedule
    rates: Axis = FIXED
    tune: bool = False
    trial_epochs: int | None = None
    second_look: bool = False
    data_dir: Path | None = None

    Epoch, Final, tested = Epoch, Final, "test_error"
    grows = ("losses", "seeds")

    def config(self) -> Line:
        return {
            "dataset": self.dataset,
            "losses": [str(spec) for spec in self.losses],
            "seeds": list(self.seeds),
            **asdict(self.schedule),
            "tune": self.tune,
            "search": axes_config(self.tune, lr=self.rates),
            "trial_epochs": self.trial_epochs or self.schedule.epochs,
            "second_look": self.second_look,
        }

    def spelled_as(self, config: Line) -> Classification:
        known = config.get("losses")
        before = [LossSpec.parse(str(loss)) for loss in known] if isinstance(known, list) else []
        losses = (
            next((old for old in before if old.same(spec, self.tune)), spec) for spec in self.losses
        )
        return replace(self, losses=tuple(losses))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(spec) for spec in self.losses)

    def space(self, name: str) -> Space:
        return Space({**LossSpec.parse(name).axes(self.tune), "lr": self.rates})

    def setting(self, name: str, values: dict[str, float]) -> tuple[str, float]:
        own = {key: value for key, value in values.items() if key != "lr"}
        return str(LossSpec.parse(name).with_values(own)), values["lr"]

    def badness(self, final: Line) -> tuple[float, ...]:
        """The validation error of the best epoch, and of equal ones the mean of all epochs."""
        return final["diverged"], final["valid_error"], final["mean_valid_error"]

    def outcome(self, final: Line) -> str:
        test = "" if final["test_error"] is None else f", test {100 * final['test_error']:.2f} %"
        diverged = " (diverged)" if final["diverged"] else ""
        return f"valid {100 * final['valid_error']:.2f} %{test}{diverged}"

    def placed(self, device: str, data_dir: Path | None) -> Classification:
        return replace(self, schedule=replace(self.schedule, device=device), data_dir=data_dir)

    def fingerprint(self, data: Images) -> Line:
        return data.fingerprint()

    def load(self) -> Images:
        return data.load(self.dataset, self.data_dir).to(self.schedule.device)

    def check_network(self, images: Images) -> None:
        """Raises LabError if the images cannot pass through the network."""
        image_networks.suited(self.schedule.model, images.shape, images.num_classes)

    def train(
        self, task: Task, data: Images, kept: Checkpoint, on_epoch: OnEpoch
    ) -> tuple[list[Line], Line]:
        schedule = self.schedule
        if task.trial and not task.whole and self.trial_epochs is not None:
            schedule = replace(schedule, epochs=self.trial_epochs)
        history, final = train(
            data,
            LossSpec.parse(task.setting).loss(),
            task.lr,
            task.seed,
            schedule,
            read_test=not task.trial,
            kept=kept,
            on_epoch=on_epoch,
        )
        return [asdict(epoch) for epoch in history], asdict(final)
