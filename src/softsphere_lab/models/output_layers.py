"""Output layers of language models: what is compared, by name, and how each is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from softsphere.engines.options import LinearSphericalOptions
from softsphere.heads import FactoredSphericalLoss, LinearSphericalLoss
from softsphere.losses import Spherical
from softsphere.optim import FactoredSGD
from softsphere_lab.errors import LabError
from softsphere_lab.models.baselines import AdaptiveSoftmax, HierarchicalSoftmax
from softsphere_lab.study.search import Axis
from softsphere_lab.study.spec import LossSpec

__all__ = ["Output", "Ranks", "layer"]


class Ranks(Protocol):
    """What all output layers can do besides giving the loss."""

    def rank(self, hidden: Tensor, target: Tensor) -> Tensor: ...


# Softmax at less cost, by approximation or by another distribution: no losses of the registry.
BASELINES: dict[str, Callable[[int, int], nn.Module]] = {
    "adaptive_softmax": AdaptiveSoftmax,
    "hierarchical_softmax": HierarchicalSoftmax,
}


# What a loss's weights begin with, in those of nn.Linear. The outputs that squared error asks for
# are some 1/D: from the usual ones its first steps shrink the hidden layer until no ReLU is left.
SMALLER = {"squared_error": 0.01}


@dataclass(frozen=True)
class Output:
    """One thing that is compared: a loss, with its layer and what differs in the network below.

    loss: a spec of a loss, or a name in BASELINES. prior: word frequencies as the base measure.
    factored: the layer is stepped by FactoredSGD, at rate · D; else AdamW steps it. lstm: instead
    of the n-gram model. depth, activation: of the n-gram model. classes: the commonest words that
    are told apart, None for all.
    """

    loss: str
    prior: bool = False
    factored: bool = False
    rate: float | None = None
    lstm: bool = False
    depth: int | None = None
    activation: str | None = None
    classes: int | None = None

    def __str__(self) -> str:
        """What `parse` reads back.

        >>> str(Output("softmax", prior=True, depth=2))
        'softmax prior depth=2'
        """
        words = [self.loss]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is True:
                words.append(field.name)
            elif value not in (None, False):
                words.append(f"{field.name}={value}")
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> Output:
        """
        >>> output = Output.parse("spherical_softmax:eps=0.1 factored rate=0.01")
        >>> output.loss, output.factored, output.rate, output.classes
        ('spherical_softmax:eps=0.1', True, 0.01, None)
        """
        loss, *words = text.split()
        kinds = {field.name: str(field.type) for field in fields(cls)[1:]}
        given: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in kinds or ("bool" in kinds[key]) != (not value):
                raise LabError(f"an output layer has {', '.join(kinds)}, got {word!r} in {text!r}")
            read = int if "int" in kinds[key] else float if "float" in kinds[key] else str
            given[key] = read(value) if value else True
        return cls(loss, **given)

    @property
    def spec(self) -> LossSpec | None:
        """The loss with its numbers; None for a baseline."""
        return None if self.loss in BASELINES else LossSpec.parse(self.loss)

    @property
    def normalised(self) -> bool:
        """Whether it gives probabilities."""
        return self.spec is None or self.spec.loss().normalised

    @property
    def engine(self) -> str:
        """How the layer is computed, for the record."""
        if self.spec is None:
            return self.loss
        if self.factored:
            return "factored"
        return "gram" if isinstance(self.spec.loss(), Spherical) else "logits"

    def axes(self, rates: Axis) -> dict[str, Axis]:
        """What a search chooses from: a loss's own numbers, and the rate of a factored layer."""
        axes = {} if self.spec is None else self.spec.axes(True)
        return {**axes, "rate": rates} if self.factored and self.rate is None else axes

    def at(self, values: Mapping[str, float]) -> Output:
        """The same with values for what is searched for.

        >>> str(Output("spherical_softmax", factored=True).at({"eps": 0.1, "rate": 0.01}))
        'spherical_softmax:eps=0.1 factored rate=0.01'
        """
        own = {key: value for key, value in values.items() if key != "rate"}
        loss = self.loss if self.spec is None else str(self.spec.with_values(own))
        return replace(self, loss=loss, rate=values.get("rate", self.rate))


def layer(
    output: Output, width: int, counts: Tensor, device: str
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """The layer, and the optimizer that is its own; None where AdamW steps it with the rest.

    output: of which nothing is left to search for. counts: (D) of the classes. Every layer but the
    baselines begins with the weights of the same nn.Linear, squared error with smaller ones.
    """
    D = len(counts)
    if output.spec is None:
        return BASELINES[output.loss](width, D).to(device), None
    linear = nn.Linear(width, D)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(SMALLER.get(output.spec.name, 1.0))
    prior = counts if output.prior else None
    loss = output.spec.loss()
    if output.rate is not None:
        factored = FactoredSphericalLoss(width, D, loss, prior=prior)
        factored.load_state_dict(linear.state_dict(), strict=False)
        factored.to(device)
        return factored, FactoredSGD(factored.parameters(), lr=output.rate * D)
    engine = "gram" if isinstance(loss, Spherical) else "auto"
    head = LinearSphericalLoss.from_linear(
        linear, loss, prior=prior, options=LinearSphericalOptions(engine=engine)
    )
    return head.to(device), None
