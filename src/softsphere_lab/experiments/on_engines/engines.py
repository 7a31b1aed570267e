"""One LSTM under AdamW, with the linear output layer computed by each of its engines."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from softsphere.engines.options import LinearSphericalOptions
from softsphere.heads import LinearSphericalLoss
from softsphere_lab.data.text import Text
from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_engines.side_by_side import SideBySide, side_by_side_section
from softsphere_lab.models.text_networks import LSTM
from softsphere_lab.training.engine_run import EngineRun
from softsphere_lab.training.text_parts import window_parts

__all__ = ["EXPERIMENT", "Engines"]


@dataclass(frozen=True)
class Engines(SideBySide):
    """lr: AdamW's, for all layers. length: words of a window; batch_size: windows in a step."""

    length: int = 32

    @property
    def names(self) -> tuple[str, ...]:
        return ("gram", "chunked", "dense")

    def begin(self, engine: str, data: Text) -> EngineRun:
        torch.manual_seed(self.seed)
        D, device, dtype = len(data.words), self.device, self.torch_dtype
        # drawn in float32 whatever the dtype, so that runs in both begin with the same weights
        model = LSTM(D, self.embedding, self.width).to(device, dtype)
        linear = nn.Linear(self.width, D).to(device, dtype)
        head = LinearSphericalLoss.from_linear(
            linear,
            self.loss,
            prior=data.counts.to(dtype) if self.prior else None,
            options=LinearSphericalOptions(engine=engine),
        ).to(device)
        return EngineRun(
            model,
            head,
            [torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=self.lr)],
            window_parts(data, self.length, device),
            batch_size=self.batch_size,
            seed=self.seed,
        )


FULL = Engines(
    dataset="ptb",
    loss="taylor_softmax",
    prior=True,
    embedding=64,
    width=128,
    batch_size=32,
    epochs=2,
    lr=0.003,
)

EXPERIMENT = StudyReproduction(
    name="engines",
    title="One training by each engine of the linear layer",
    claim=(
        "All engines of `LinearSphericalLoss` compute the same loss and gradients, so that a model "
        "is trained alike by each, and only the time of a step differs."
    ),
    differences="The papers have no such experiment: it puts this library to the test.",
    studies={
        "smoke": replace(
            FULL, dataset="generated", embedding=8, width=16, length=8, batch_size=16, epochs=2
        ),
        "small": replace(FULL, epochs=1),
        "full": FULL,
    },
    section_of=side_by_side_section,
    timed=True,
)
