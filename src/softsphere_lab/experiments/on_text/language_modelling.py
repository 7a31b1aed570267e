"""Output layers compared on one text: the same network, words and search for each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch.distributed as dist

from softsphere_lab.data import text
from softsphere_lab.data.similarity import load_pairs
from softsphere_lab.errors import LabError
from softsphere_lab.experiments.on_text.processes_of_a_run import check_processes
from softsphere_lab.models.kept_clusters import kept_assignments
from softsphere_lab.models.output_layers import Output
from softsphere_lab.models.text_clusters import BY, WordClusters
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Line
from softsphere_lab.study.protocol import OnEpoch, Study, Task
from softsphere_lab.study.search import Axis, Space
from softsphere_lab.study.spec import axes_config
from softsphere_lab.training.language_run import Data, Epoch, Final, LanguageRun, Setup
from softsphere_lab.training.text_parts import perplexity

__all__ = ["LAYER_RATES", "RATES", "LanguageModelling"]

RATES = Axis((1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 3e-3)
LAYER_RATES = Axis((1e-4, 1e-3, 0.01, 0.1, 1.0), 0.01)


@dataclass(frozen=True)
class LanguageModelling(Study):
    """Output layers compared on one text.

    rates, layer_rates: the learning rates of the setup's optimizer, and of FactoredSGD as multiples
    of the number of classes D, that the search may try. trial_words: how many words of the training
    part a trial reads; None for all. second_look: whether the rates about the best are then tried
    in runs as long as final ones. once: those of the outputs that are run with the first seed
    alone. nproc: how many processes train each run together, with the numbers of one.
    """

    dataset: str
    outputs: tuple[Output, ...]
    seeds: tuple[int, ...]
    setup: Setup
    trial_epochs: int
    rates: Axis = RATES
    layer_rates: Axis = LAYER_RATES
    trial_words: int | None = None
    second_look: bool = False
    data_dir: Path | None = None
    once: tuple[Output, ...] = ()
    nproc: int = 1

    Epoch, Final, tested = Epoch, Final, "test_mrr"
    grows = ("outputs", "seeds")
    # Whether a final run reads the test part.
    reads_test: ClassVar[bool] = True
    # What a user can do who has a text with too few words.
    shorter: ClassVar[str] = "another --budget"

    def config(self) -> Line:
        return {
            "dataset": self.dataset,
            "outputs": list(self.names),
            "seeds": list(self.seeds),
            **self.setup.config(),
            "search": axes_config(True, lr=self.rates, rate=self.layer_rates),
            "trial_epochs": self.trial_epochs,
            "trial_words": self.trial_words,
            "second_look": self.second_look,
        }

    @property
    def device(self) -> str:  # type: ignore[override]
        """Where the runs are trained."""
        return self.setup.device

    @property
    def by_name(self) -> dict[str, Output]:
        """The output layers by the names that a record has."""
        return {str(output): output for output in self.outputs}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.by_name)

    def seeds_of(self, name: str) -> tuple[int, ...]:
        return self.seeds[:1] if self.by_name[name] in self.once else self.seeds

    def space(self, name: str) -> Space:
        return Space({**self.by_name[name].axes(self.layer_rates), "lr": self.rates})

    def setting(self, name: str, values: dict[str, float]) -> tuple[str, float]:
        own = {key: value for key, value in values.items() if key != "lr"}
        return str(self.by_name[name].at(own)), values["lr"]

    def badness(self, final: Line) -> tuple[float, ...]:
        """The validation loss of the best epoch, or the ranking for a loss without likelihood."""
        nll = final["valid_nll"]
        return final["diverged"], -final["valid_mrr"] if nll is None else nll

    def outcome(self, final: Line) -> str:
        nll = final["valid_nll"]
        likely = "" if nll is None else f"valid perplexity {perplexity(nll):.1f}, "
        diverged = " (diverged)" if final["diverged"] else ""
        return f"{likely}MRR {final['valid_mrr']:.4f}, {final['seconds']:.0f} s{diverged}"

    def placed(self, device: str, data_dir: Path | None) -> LanguageModelling:
        return replace(self, setup=replace(self.setup, device=device), data_dir=data_dir)

    def over_processes(self, nproc: int) -> LanguageModelling:
        check_processes(nproc, self.outputs, self.setup)
        return replace(self, nproc=nproc)

    def fingerprint(self, data: Data) -> Line:
        return {**data.text.fingerprint(), "pairs": {k: len(v) for k, v in data.pairs.items()}}

    def load(self) -> Data:
        whole = text.load(self.dataset, self.data_dir)
        least = max(self.setup.train or 1, self.trial_words or 1)
        if len(whole.train) < least:
            raise LabError(
                f"--data-dir: {self.dataset} has {len(whole.train):,} words to train on, and "
                f"{least:,} are to be read; give a larger text, or {self.shorter}"
            )
        classes = max((output.classes or 2 for output in self.outputs), default=2)
        if len(whole.words) < classes:
            raise LabError(
                f"--data-dir: {self.dataset} has {len(whole.words):,} different words, and this "
                f"budget tells {classes:,} apart; give a larger text, or another --budget"
            )
        some = whole if self.setup.train is None else whole.first(self.setup.train)
        if self.setup.held is not None:
            some = some.held(self.setup.held)
        return Data(some, load_pairs(self.data_dir))

    def furnished(self, data: Data, folder: Path) -> Data:
        made = kept_assignments(self.outputs, folder, BY, WordClusters(data.text))
        return replace(data, assignments=made)

    def train(
        self, task: Task, data: Data, kept: Checkpoint, on_epoch: OnEpoch
    ) -> tuple[list[Line], Line]:
        setup, words = self.setup, data.text
        if task.trial and not task.whole:
            setup = replace(setup, epochs=self.trial_epochs)
            if self.trial_words is not None:
                words = words.first(self.trial_words)
        output = Output.parse(task.setting)
        group = dist.group.WORLD if self.nproc > 1 else None
        run = LanguageRun(words, output, task.lr, task.seed, setup, data.assignments, group)
        run.train(setup.epochs, kept, on_epoch)
        final = run.final(data, read_test=self.reads_test and not task.trial)
        return [asdict(epoch) for epoch in run.history], asdict(final)
