"""Output layers of language models: the names that are compared, and how each is built."""

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
    """What all output layers can do besides computing the loss."""

    def rank(self, hidden: Tensor, target: Tensor) -> Tensor: ...


# Softmax at less cost, by an approximation or another distribution. Not losses of the library.
BASELINES: dict[str, Callable[[int, int], nn.Module]] = {
    "adaptive_softmax": AdaptiveSoftmax,
    "hierarchical_softmax": HierarchicalSoftmax,
}


# The initial weights of a loss, as a multiple of those of nn.Linear. The outputs that minimise
# squared error are about 1/D. From the usual weights, its first steps would shrink the hidden layer
# until no ReLU is active.
SMALLER = {"squared_error": 0.01}


@dataclass(frozen=True)
class Output:
    """One entry of a comparison: a loss, its layer, and what differs in the network below.

    loss: a loss with its numbers, or a key of BASELINES. prior: whether word frequencies are the
    base measure. factored: whether FactoredSGD steps the layer, with the learning rate rate · D;
    otherwise AdamW steps it. lstm: whether the network is the LSTM and not the n-gram model. depth,
    activation: those of the n-gram model. classes: how many of the commonest words are told apart;
    None means all.
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
        """Returns the name that `parse` reads.

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
        """Reads a name. Raises LabError if it has a word that is not known.

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
        """The loss with its numbers, or None for a baseline."""
        return None if self.loss in BASELINES else LossSpec.parse(self.loss)

    @property
    def normalised(self) -> bool:
        """Whether it has probabilities."""
        return self.spec is None or self.spec.loss().normalised

    @property
    def engine(self) -> str:
        """How the layer is computed, as the record says it."""
        if self.spec is None:
            return self.loss
        if self.factored:
            return "factored"
        return "gram" if isinstance(self.spec.loss(), Spherical) else "logits"

    def axes(self, rates: Axis) -> dict[str, Axis]:
        """Returns what a search chooses: a loss's own numbers, and the rate of a factored layer."""
        axes = {} if self.spec is None else self.spec.axes(True)
        return {**axes, "rate": rates} if self.factored and self.rate is None else axes

    def at(self, values: Mapping[str, float]) -> Output:
        """Returns the same output layer with the values that a search chose.

        >>> str(Output("spherical_softmax", factored=True).at({"eps": 0.1, "rate": 0.01}))
        'spherical_softmax:eps=0.1 factored rate=0.01'
        """
        own = {key: value for key, value in values.items() if key != "rate"}
        loss = self.loss if self.spec is None else str(self.spec.with_values(own))
        return replace(self, loss=loss, rate=values.get("rate", self.rate))


def layer(
    output: Output, width: int, counts: Tensor, device: str
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Returns the layer and its own optimizer, which is None if AdamW steps it with the network.

    Every layer but the baselines begins with the weights of the same nn.Linear; squared error
    begins with smaller ones.

    output: a layer with nothing left to search for. counts: (D) how often each class occurs.
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
