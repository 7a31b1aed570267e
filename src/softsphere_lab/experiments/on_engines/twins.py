"""One n-gram model under SGD, with the factored output layer and with dense ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from softsphere.criteria import SphericalLoss
from softsphere.heads import FactoredSphericalLoss
from softsphere.optim import FactoredSGD
from softsphere_lab.data.text import Text
from softsphere_lab.experiments.experiment import StudyReproduction
from softsphere_lab.experiments.on_engines.side_by_side import SideBySide, side_by_side_section
from softsphere_lab.models.text_networks import ngram_network
from softsphere_lab.training.engine_run import EngineRun
from softsphere_lab.training.text_parts import ngram_parts

__all__ = ["FLOAT32", "FLOAT64", "Twins"]


class DenseTwin(nn.Module):
    """diag(√π) [W b] as one parameter, which is what FactoredSGD steps, with all of the logits."""

    def __init__(self, head: FactoredSphericalLoss) -> None:
        super().__init__()
        pi = head.matrix.arrays.pi
        self.root = None if pi is None else pi.sqrt().unsqueeze(1)
        W = head.dense()
        self.parameter = nn.Parameter(W if self.root is None else self.root * W)
        self.criterion = SphericalLoss(head.loss, prior=pi)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        W = self.parameter if self.root is None else self.parameter / self.root
        value: Tensor = self.criterion(nn.functional.linear(hidden, W[:, :-1], W[:, -1]), target)
        return value

    def nudge(self) -> None:
        """Changes the last digit of one weight."""
        with torch.no_grad():
            first = self.parameter.view(-1)[:1]
            first.copy_(first.nextafter(first + 1))


@dataclass(frozen=True)
class Twins(SideBySide):
    """lr, momentum: of the output layer, lr as a multiple of the number of classes D.

    n: words of an n-gram; batch_size: n-grams in a step. trunk_lr: SGD's rate for the layers below.
    """

    n: int = 5
    momentum: float = 0.0
    trunk_lr: float = 0.05

    @property
    def names(self) -> tuple[str, ...]:
        """The engines. "nudged" is "dense" with the last digit of one weight changed.

        It shows what rounding alone can do, since training multiplies small differences, whatever
        they come from.
        """
        return ("factored", "nudged", "dense")

    def begin(self, engine: str, data: Text) -> EngineRun:
        torch.manual_seed(self.seed)
        D, device, dtype = len(data.words), self.device, self.torch_dtype
        # drawn in float32 whatever the dtype, so that runs in both begin with the same weights
        model = ngram_network(D, self.n - 1, self.embedding, (2 * self.width, self.width)).to(
            device, dtype
        )
        head, optimizer = self.output_layer(engine, nn.Linear(self.width, D), data.counts)
        trunk = torch.optim.SGD(model.parameters(), lr=self.trunk_lr, momentum=0.9)
        return EngineRun(
            model,
            head,
            [trunk, optimizer],
            ngram_parts(data, self.n, device),
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def output_layer(
        self, engine: str, first: nn.Linear, counts: Tensor
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns the layer that begins with the weights of `first`, and its optimizer."""
        D, lr = len(counts), self.lr * len(counts)
        factored = FactoredSphericalLoss(
            self.width,
            D,
            self.loss,
            prior=counts if self.prior else None,
            device=self.device,
            dtype=self.torch_dtype,
        )
        factored.load_state_dict(first.state_dict(), strict=False)
        if engine == "factored":
            return factored, FactoredSGD(factored.parameters(), lr=lr, momentum=self.momentum)
        dense = DenseTwin(factored).to(self.device)
        if engine == "nudged":
            dense.nudge()
        return dense, torch.optim.SGD(dense.parameters(), lr=lr, momentum=self.momentum)


FULL = Twins(
    dataset="ptb",
    loss="taylor_softmax",
    prior=True,
    embedding=64,
    width=128,
    batch_size=256,
    epochs=3,
    lr=0.01,
)
SMOKE = replace(FULL, dataset="generated", embedding=8, width=16, batch_size=64, epochs=2, lr=0.02)
CLAIM = (
    "A step of the factored layer is exactly that of SGD on the dense weights (arXiv:1412.7091), "
    "so that both train alike up to rounding, {}."
)
DIFFERENCES = (
    'The paper compares no training. "nudged" is "dense" with the last digit of one weight '
    "changed: it shows what rounding alone does to a training."
)

FLOAT32 = StudyReproduction(
    name="twins",
    title="Factored and dense training side by side, float32",
    claim=CLAIM.format("which training multiplies in float32 as it does any small difference"),
    differences=DIFFERENCES,
    studies={"smoke": SMOKE, "small": replace(FULL, epochs=1), "full": FULL},
    section_of=side_by_side_section,
    timed=True,
)
FLOAT64 = StudyReproduction(
    name="twins-float64",
    title="Factored and dense training side by side, float64",
    claim=CLAIM.format("which is too small to be seen in float64"),
    differences=DIFFERENCES,
    studies={
        "smoke": replace(SMOKE, dtype="float64"),
        "small": replace(FULL, dtype="float64", epochs=1, width=32),
        "full": replace(FULL, dtype="float64", epochs=1),
    },
    section_of=side_by_side_section,
    timed=True,
)
