"""Output layers compared on one set of interactions: the same network and search for each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from softsphere_lab.data import interactions
from softsphere_lab.data.interactions import Interactions
from softsphere_lab.models.item_clusters import BY, item_clusters
from softsphere_lab.models.kept_clusters import Assignments, assignment_name, kept_assignments
from softsphere_lab.models.output_layers import Output
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Line
from softsphere_lab.study.protocol import OnEpoch, Study, Task
from softsphere_lab.study.search import Axis, Space
from softsphere_lab.study.spec import axes_config
from softsphere_lab.training.recommend_run import CUTOFF, Epoch, Final, RecommendRun, Setup

__all__ = ["Data", "Recommendation"]

RATES = Axis((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-2)
LAYER_RATES = Axis((1e-4, 1e-3, 0.01, 0.1, 1.0), 0.01)
# The weights of what was not observed that a search may try for squared error.
UNOBSERVED = Axis((0.001, 0.003, 0.01, 0.03, 0.1, 0.3), 0.01)


@dataclass(frozen=True)
class Data:
    """Interactions, and the clusters of the items."""

    interactions: Interactions
    assignments: Assignments = field(default_factory=dict)


@dataclass(frozen=True)
class Recommendation(Study):
    """Output layers compared on one set of interactions.

    The search trains on the training part and looks at the validation part. Final runs train on
    both, with what the search chose, and read the test part once.

    rates, layer_rates: the learning rates of AdamW, and of FactoredSGD as multiples of the number
    of items D, that the search may try. unobserved: the weights of what was not observed that it
    may try for squared error. trial_epochs: the epochs of a trial.
    """

    dataset: str
    outputs: tuple[Output, ...]
    seeds: tuple[int, ...]
    setup: Setup
    trial_epochs: int
    rates: Axis = RATES
    layer_rates: Axis = LAYER_RATES
    unobserved: Axis = UNOBSERVED
    second_look: bool = False
    data_dir: Path | None = None

    Epoch, Final, tested = Epoch, Final, "test_recall"
    grows = ("outputs", "seeds")

    def config(self) -> Line:
        return {
            "dataset": self.dataset,
            "outputs": list(self.names),
            "seeds": list(self.seeds),
            **asdict(self.setup),
            "search": axes_config(
                True, lr=self.rates, rate=self.layer_rates, unobserved=self.unobserved
            ),
            "trial_epochs": self.trial_epochs,
            "second_look": self.second_look,
        }

    @property
    def by_name(self) -> dict[str, Output]:
        """The output layers by the names that a record has."""
        return {str(output): output for output in self.outputs}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name)

    def space(self, name: str) -> Space:
        output = self.by_name[name]
        own = {"unobserved": self.unobserved} if output.loss == "squared_error" else {}
        return Space({**output.axes(self.layer_rates), **own, "lr": self.rates})

    def setting(self, name: str, values: dict[str, float]) -> tuple[str, float]:
        own = {key: value for key, value in values.items() if key != "lr"}
        return str(self.by_name[name].at(own)), values["lr"]

    def badness(self, final: Line) -> tuple[float, ...]:
        """The validation recall, as a number that is less where it is better."""
        return final["diverged"], -final["valid_recall"]

    def outcome(self, final: Line) -> str:
        part = "valid" if final["test_recall"] is None else "test"
        recall, ndcg = final[f"{part}_recall"], final[f"{part}_ndcg"]
        diverged = " (diverged)" if final["diverged"] else ""
        return (
            f"{part} Recall@{CUTOFF} {recall:.4f}, NDCG@{CUTOFF} {ndcg:.4f}, "
            f"{final['seconds']:.0f} s{diverged}"
        )

    def placed(self, device: str, data_dir: Path | None) -> Recommendation:
        return replace(self, setup=replace(self.setup, device=device), data_dir=data_dir)

    def fingerprint(self, data: Data) -> Line:
        return data.interactions.fingerprint()

    def load(self) -> Data:
        return Data(interactions.load(self.dataset, self.data_dir))

    def furnished(self, data: Data, folder: Path) -> Data:
        """Returns the data with clusters of items that the same users like.

        They are made from the training part, and kept so that runs that are resumed have the same.
        """
        make = partial(item_clusters, data.interactions)
        return replace(data, assignments=kept_assignments(self.outputs, folder, BY, make))

    def train(
        self, task: Task, data: Data, kept: Checkpoint, on_epoch: OnEpoch
    ) -> tuple[list[Line], Line]:
        short = task.trial and not task.whole
        setup = replace(self.setup, epochs=self.trial_epochs) if short else self.setup
        output = Output.parse(task.setting)
        run = RecommendRun(
            data.interactions,
            output,
            task.lr,
            task.seed,
            setup,
            joined=not task.trial,
            assignment=data.assignments.get(assignment_name(output, BY)),
        )
        run.train(setup.epochs, kept, on_epoch)
        final = run.final(read_test=not task.trial)
        return [asdict(epoch) for epoch in run.history], asdict(final)
