"""Output layers of language models: the names that are compared, and how each is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere.engines.options import LinearSphericalOptions
from softsphere.heads import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SampledSoftmaxLoss,
)
from softsphere.losses import Spherical
from softsphere.optim import FactoredSGD
from softsphere_lab.errors import LabError
from softsphere_lab.models.baselines import AdaptiveSoftmax, HierarchicalSoftmax
from softsphere_lab.study.search import Axis
from softsphere_lab.study.spec import LossSpec

__all__ = ["BASELINES", "Output", "Ranks", "layer", "tied_rows"]


class Ranks(Protocol):
    """What all output layers can do besides computing the loss."""

    def rank(self, hidden: Tensor, target: Tensor) -> Tensor: ...


# The initial weights of a loss, as a multiple of those of nn.Linear. The outputs that minimise
# squared error are about 1/D. From the usual weights, its first steps would shrink the hidden layer
# until no ReLU is active.
SMALLER = {"squared_error": 0.01}


@dataclass(frozen=True)
class Output:
    """One entry of a comparison: a loss, its layer, and what differs in the network below.

    loss: a loss with its numbers, or a key of BASELINES. prior: whether word frequencies are the
    base measure. factored: whether FactoredSGD steps the layer, with the learning rate rate · D;
    otherwise it is stepped with the network. tied: whether the rows of the output weight are the
    input embeddings, as they can be in a network whose embeddings are as wide as its hidden states.
    lstm: whether the network is the LSTM and not the n-gram model. depth, activation: those of the
    n-gram model. classes: how many of the commonest words are told apart; None means all. samples,
    sampler: those of sampled softmax. cutoffs, div_value: those of adaptive softmax. Both begin
    with the logarithms of the word frequencies, where they have a bias, if prior is True. clusters:
    how many clusters the words outside the shortlist make, each a distribution of its own with
    their frequencies as the base measure. shortlist: how many of the commonest words are in no
    cluster. by: "frequency" for clusters of words that are about as common; None for clusters by
    meaning. leaf_features: the width of the projection of the hidden state that the clusters get;
    None for the hidden state itself. For all of these None means the default.
    """

    loss: str
    prior: bool = False
    factored: bool = False
    rate: float | None = None
    tied: bool = False
    lstm: bool = False
    depth: int | None = None
    activation: str | None = None
    classes: int | None = None
    samples: int | None = None
    sampler: str | None = None
    cutoffs: tuple[int, ...] | None = None
    div_value: float | None = None
    clusters: int | None = None
    shortlist: int | None = None
    by: str | None = None
    leaf_features: int | None = None

    def __post_init__(self) -> None:
        self._check_clusters()
        for name, loss in _MEANT_FOR.items():
            if getattr(self, name) is not None and self.loss != loss:
                raise LabError(f"{name} is for {loss}, got it for {self.loss}; leave it out")
        if self.tied and (self.factored or self.leaf_features or self._has_narrow_rows()):
            raise LabError(f"{str(self)!r} cannot be tied: its rows are no input embeddings")
        taken = {"prior": self.loss != "hierarchical_softmax", "factored": False}
        for name, possible in taken.items():
            if getattr(self, name) and self.loss in BASELINES and not possible:
                raise LabError(f"{name} has no meaning for {self.loss}; leave it out")

    def _has_narrow_rows(self) -> bool:
        """Whether a class may have a row that is not as wide as the hidden states."""
        if self.loss == "adaptive_softmax":
            return self.div_value != 1
        return self.loss == "hierarchical_softmax"

    def _check_clusters(self) -> None:
        """Raises LabError for what clusters cannot be, or have no meaning together with."""
        if self.by not in (None, "frequency"):
            raise LabError(f"by must be frequency or left out, got {self.by!r}")
        if self.clusters is None:
            for name in ("shortlist", "by", "leaf_features"):
                if getattr(self, name) is not None:
                    raise LabError(f"{name} is for an output layer with clusters; add clusters=…")
            return
        if self.loss in BASELINES:
            raise LabError(f"clusters have no meaning for {self.loss}; leave them out")
        for name in ("prior", "factored", "classes"):
            if getattr(self, name):
                raise LabError(f"{name} has no meaning for an output layer with clusters")

    def __str__(self) -> str:
        """Returns the name that `parse` reads.

        >>> str(Output("softmax", prior=True, depth=2))
        'softmax prior depth=2'
        >>> str(Output("adaptive_softmax", cutoffs=(2000, 10_000)))
        'adaptive_softmax cutoffs=2000,10000'
        """
        words = [self.loss]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is True:
                words.append(field.name)
            elif value not in (None, False):
                written = ",".join(map(str, value)) if isinstance(value, tuple) else value
                words.append(f"{field.name}={written}")
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
            given[key] = _read(kinds[key], value) if value else True
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
        if self.clusters is not None:
            return "clusters"
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


def _read(kind: str, text: str) -> Any:
    """The value of a field of this type."""
    if kind.startswith("tuple"):
        return tuple(map(int, text.split(",")))
    return (int if "int" in kind else float if "float" in kind else str)(text)


def _adaptive(output: Output, width: int, counts: Tensor) -> nn.Module:
    cutoffs, div_value = output.cutoffs, output.div_value
    head = AdaptiveSoftmax(width, len(counts), counts=counts, cutoffs=cutoffs, div_value=div_value)
    if output.prior:
        ranked = counts.sort(descending=True).values
        first, *others = ranked.tensor_split(head.layer.cutoffs[:-1])
        shares = torch.cat([first, torch.stack([other.sum() for other in others])])
        with torch.no_grad():
            head.layer.head.bias.copy_((shares / counts.sum()).log())
    return head


def _hierarchical(output: Output, width: int, counts: Tensor) -> nn.Module:
    return HierarchicalSoftmax(width, len(counts), counts=counts)


def _sampled(output: Output, width: int, counts: Tensor) -> nn.Module:
    """Softmax, trained on negatives that are drawn by frequency unless a sampler is named."""
    sampler = output.sampler or "frequency"
    known = None if sampler == "log_uniform" else counts
    head = SampledSoftmaxLoss(width, len(counts), output.samples, sampler=sampler, counts=known)
    if output.prior and head.bias is not None:
        with torch.no_grad():
            head.bias.copy_((counts / counts.sum()).log())
    return head


# Softmax at less cost, by an approximation or another distribution: a layer for an output, a width
# and counts of words. They are not losses of the library.
BASELINES: dict[str, Callable[[Output, int, Tensor], nn.Module]] = {
    "adaptive_softmax": _adaptive,
    "hierarchical_softmax": _hierarchical,
    "sampled_softmax": _sampled,
}
# What has a meaning for one of them alone.
_MEANT_FOR = {
    "samples": "sampled_softmax",
    "sampler": "sampled_softmax",
    "cutoffs": "adaptive_softmax",
    "div_value": "adaptive_softmax",
}


def layer(
    output: Output, width: int, counts: Tensor, device: str, assignment: Tensor | None = None
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Returns the layer and its own optimizer, which is None if it is stepped with the network.

    Every layer but the baselines and those with clusters begins with the weights of the same
    nn.Linear; squared error begins with smaller ones.

    output: a layer with nothing left to search for. counts: (D) how often each class occurs.
    assignment: (D) the cluster of each class, −1 for the shortlist, where the layer has clusters.
    """
    D = len(counts)
    if output.spec is None:
        return BASELINES[output.loss](output, width, counts).to(device), None
    if output.clusters is not None:
        if assignment is None:
            raise ValueError(f"{output} needs the assignment of the classes to its clusters")
        leaf, projected = output.spec.loss(), output.leaf_features
        clustered = ClusteredLoss(
            width, D, assignment, leaf=leaf, leaf_features=projected, counts=counts
        )
        return clustered.to(device), None
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


def tied_rows(head: nn.Module, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Copies rows (D, width) into the weight of a layer, and returns what reads them from there.

    That is a function of class indices, whose gradients go to the layer.
    """
    if isinstance(head, ClusteredLoss | AdaptiveSoftmax):
        head.copy_rows(rows)
        return head.rows
    weight = cast(nn.Parameter, head.weight)
    with torch.no_grad():
        weight.copy_(rows)
    return lambda classes: F.embedding(classes, weight)
