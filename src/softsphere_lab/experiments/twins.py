"""One n-gram model with the factored output layer and with dense ones under the same SGD."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softsphere.criteria import SphericalLoss
from softsphere.heads import FactoredSphericalLoss
from softsphere.optim import FactoredSGD
from softsphere_lab.data.text import Text
from softsphere_lab.training import language

__all__ = ["ENGINES", "Plan", "run"]

# The second is the third with the last digit of one weight changed: what rounding alone can do,
# since training multiplies small differences whatever they come from.
ENGINES = ("factored", "nudged", "dense")


@dataclass(frozen=True)
class Plan:
    """The model and its training; lr is that of the output layer as a share of the classes D."""

    dataset: str
    loss: str
    prior: bool
    n: int
    embedding: int
    width: int
    batch_size: int
    epochs: int
    lr: float
    momentum: float
    trunk_lr: float
    seed: int
    device: str
    dtype: str


class DenseTwin(nn.Module):
    """diag(√π) [W b] as one parameter, which is what FactoredSGD steps; with all the logits."""

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


def run(plan: Plan, engine: str, text: Text, on_step: language.OnStep) -> list[dict[str, Any]]:
    """Trains with one engine: a line for each epoch and one for the end."""
    torch.manual_seed(plan.seed)
    D, device, dtype = len(text.words), plan.device, getattr(torch, plan.dtype)
    # drawn in float32 whatever the dtype, so that runs in both begin with the same weights
    model = language.mlp(D, plan.n - 1, plan.embedding, (2 * plan.width, plan.width)).to(
        device, dtype
    )
    first = nn.Linear(plan.width, D)
    factored = FactoredSphericalLoss(
        plan.width,
        D,
        plan.loss,
        prior=text.counts if plan.prior else None,
        device=device,
        dtype=dtype,
    )
    factored.load_state_dict(first.state_dict(), strict=False)
    lr = plan.lr * D
    head: FactoredSphericalLoss | DenseTwin = factored
    layer: torch.optim.Optimizer
    if engine == "factored":
        layer = FactoredSGD(factored.parameters(), lr=lr, momentum=plan.momentum)
    else:
        head = DenseTwin(factored).to(device)
        if engine == "nudged":
            with torch.no_grad():
                first_weight = head.parameter.view(-1)[:1]
                first_weight.copy_(first_weight.nextafter(first_weight + 1))
        layer = torch.optim.SGD(head.parameters(), lr=lr, momentum=plan.momentum)
    rest = torch.optim.SGD(model.parameters(), lr=plan.trunk_lr, momentum=0.9)
    lines, test_loss = language.fit(
        model,
        head,
        [rest, layer],
        language.ngram_parts(text, plan.n, device),
        batch_size=plan.batch_size,
        epochs=plan.epochs,
        seed=plan.seed,
        on_step=on_step,
    )
    final: dict[str, Any] = {"final": {"test_loss": test_loss}}
    if head is factored:
        final["health"] = asdict(factored.health())
    return [*lines, final]
