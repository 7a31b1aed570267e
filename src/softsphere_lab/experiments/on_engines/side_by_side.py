"""One training done by several engines: the same numbers but for rounding, at another speed."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from softsphere import losses
from softsphere_lab.data import text
from softsphere_lab.data.text import Text
from softsphere_lab.records.checkpoint import Checkpoint
from softsphere_lab.records.folder import Line
from softsphere_lab.report import figures
from softsphere_lab.report.grids import markdown
from softsphere_lab.report.results import Results, Section
from softsphere_lab.study.protocol import OnEpoch, Study, Task
from softsphere_lab.study.search import Axis, Space
from softsphere_lab.training.engine_run import EngineEpoch, EngineFinal, EngineRun

__all__ = ["SideBySide", "side_by_side_section"]


@dataclass(frozen=True)
class SideBySide(Study):
    """One model, one text and one seed, trained by each engine. The last engine is the reference.

    loss: a name of the registry. prior: whether word frequencies are the base measure. width: d, of
    what the output layer sees. dtype: of all of the training.
    """

    dataset: str
    loss: str
    prior: bool
    embedding: int
    width: int
    batch_size: int
    epochs: int
    lr: float
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    data_dir: Path | None = None

    Epoch, Final, tested = EngineEpoch, EngineFinal, "test_loss"
    grows = ()
    second_look = False

    @abstractmethod
    def begin(self, engine: str, data: Text) -> EngineRun:
        """Returns the run of an engine, which is to be trained."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The engines."""

    @property
    def seeds(self) -> tuple[int, ...]:  # type: ignore[override]
        """The one seed."""
        return (self.seed,)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def config(self) -> Line:
        asked = {field.name: getattr(self, field.name) for field in fields(self)}
        del asked["data_dir"]
        return {**asked, "engines": list(self.names)}

    def space(self, name: str) -> Space:
        return Space({"lr": Axis.fixed(self.lr)})

    def setting(self, name: str, values: dict[str, float]) -> tuple[str, float]:
        return name, values["lr"]

    def badness(self, final: Line) -> tuple[float, ...]:
        """All trials are equally good: the space has one point, and nothing is searched for."""
        return ()

    def outcome(self, final: Line) -> str:
        return "diverged" if final["diverged"] else f"test loss {final['test_loss']:.6f}"

    def placed(self, device: str, data_dir: Path | None) -> SideBySide:
        return replace(self, device=device, data_dir=data_dir)

    def fingerprint(self, data: Text) -> Line:
        return data.fingerprint()

    def load(self) -> Text:
        return text.load(self.dataset, self.data_dir)

    def train(
        self, task: Task, data: Text, kept: Checkpoint, on_epoch: OnEpoch
    ) -> tuple[list[Line], Line]:
        run = self.begin(task.loss, data)
        run.train(self.epochs, kept, on_epoch)
        health = getattr(run.head, "health", None)
        final = EngineFinal(
            test_loss=run.loss_on("test"),
            health=None if health is None else asdict(health()),
            diverged=run.diverged,
        )
        return [asdict(epoch) for epoch in run.history], asdict(final)


def side_by_side_section(results: Results) -> Section:
    """Returns the losses by epoch and the seconds of a step, and how far the curves are apart."""
    table = _curves_table(results)
    found = "\n\n".join(_curves_apart(results))
    return Section(
        text=f"{_model_and_training(results)}\n{table}\n{found}\n",
        table=table,
        finding=found,
        pictures={"curves": partial(_draw_curves, results)},
    )


def _model_and_training(results: Results) -> str:
    """Returns sentences about the model and its training."""
    asked = results.config
    loss = losses.get(asked["loss"])
    measure = " with word frequencies as the base measure" if asked["prior"] else ""
    what = "Perplexities" if loss.normalised else "Losses"
    return (
        f"The loss is `{asked['loss']}`{measure} on the text `{asked['dataset']}`; embeddings of "
        f"{asked['embedding']}, an output layer on d = {asked['width']}, {asked['dtype']}, seed "
        f"{asked['seed']}. {what} are of the validation part after each epoch and of the test part "
        "at the end. A step is forward, backward and update.\n"
    )


def _curves_table(results: Results) -> str:
    """Returns a row for each engine: perplexity or loss by epoch and on the test part, and time."""
    normalised = losses.get(results.config["loss"]).normalised

    def shown(loss: float) -> str:
        return f"{math.exp(loss):.3f}" if normalised else f"{loss:.6f}"

    epochs = sorted({line["epoch"] for line in results.epochs})
    rows = []
    for engine, ends in results.ends.items():
        curve = {line["epoch"]: line for line in _curve_of(results, engine)}
        final = _final_of(ends)
        seconds = [line["step_seconds"] for line in curve.values()]
        rows.append(
            (
                engine + (" (diverged)" if final["diverged"] else ""),
                *(shown(curve[e]["valid_loss"]) if e in curve else "–" for e in epochs),
                "–" if final["diverged"] else shown(final["test_loss"]),
                f"{1000 * sum(seconds) / len(seconds):.2f}" if seconds else "–",
            )
        )
    header = ("engine", *(f"epoch {e}" for e in epochs), "test", "ms a step")
    return markdown(header, rows)


def _final_of(ends: Mapping[int, Line]) -> Line:
    """Returns the end of an engine's one run."""
    (line,) = ends.values()
    final: Line = line["final"]
    return final


def _curve_of(results: Results, engine: str) -> list[Line]:
    """Returns the epochs of an engine, in order."""
    own = [line for line in results.epochs if line["loss"] == engine]
    return sorted(own, key=lambda line: line["epoch"])


def _curves_apart(results: Results) -> list[str]:
    """Returns a sentence for each engine but the reference: how the curves and steps compare."""
    *engines, reference = results.config["engines"]
    sentences = []
    for engine in engines:
        mine, other = _curve_of(results, engine), _curve_of(results, reference)
        if not mine or len(mine) != len(other):
            continue
        apart = max(
            abs(a["valid_loss"] - b["valid_loss"]) / abs(b["valid_loss"])
            for a, b in zip(mine, other, strict=True)
        )
        seconds = [sum(line["step_seconds"] for line in curve) for curve in (other, mine)]
        sentences.append(
            f"The curves of {engine} and {reference} differ by at most {apart:.1e} of the loss; a "
            f"whole step by {reference} takes {seconds[0] / seconds[1]:.1f} times as long."
        )
    return sentences or ["No two engines can be compared yet."]


def _draw_curves(results: Results, path: Path) -> None:
    """Draws the curves one upon the other, and the time of a step."""
    asked = results.config
    title = f"{asked['dataset']}, {asked['loss']}, d = {asked['width']}, {asked['dtype']}"
    lines = [*results.epochs, *results.lines]
    figures.side_by_side([{"engine": line["loss"], **line} for line in lines], title, path)
