"""Classes that stand for all others in a step of sampled softmax, shared by all of its rows.

E_k is the expected number of times that class k is among the negatives k_1 … k_n. So
Σ_j x(k_j) / E(k_j) is an unbiased estimate of Σ_k x(k) over all classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from softsphere import checks

__all__ = ["SAMPLES", "Drawn", "InBatch", "Negatives", "Sampler", "sampler_of"]

# The default number of samples.
SAMPLES = 1024
_SAMPLERS = ("log_uniform", "frequency", "in_batch")


class Negatives(NamedTuple):
    """classes: (n). log_expected: (n), log E of each; +∞ for a class that does not count."""

    classes: Tensor
    log_expected: Tensor


class Sampler(ABC):
    """A way to choose the negatives of a batch."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """D, or None for a sampler of any number of classes."""

    @abstractmethod
    def choose(self, target: Tensor, ignored: Tensor, dtype: torch.dtype) -> Negatives:
        """The negatives of rows with targets (m), of which some are ignored (m).

        They are on the device of the targets, and log E is in `dtype`.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Sampler:
        """The same with its tables on a device."""


@dataclass(frozen=True, eq=False)
class Drawn(Sampler):
    """n negatives that are drawn at random, whatever the batch is.

    E_k = min(1, λ w_k) for given weights w, with λ such that Σ_k E_k = n. Classes with E_k = 1 are
    always negatives. Each of the others is drawn from another equal part of the distribution, which
    has a lower variance than independent draws.

    always: the classes with E_k = 1.
    count: the number of classes that are drawn, n less those.
    cumulative: (D), the sum of E over the classes that can be drawn, up to each class, and +∞ from
        the last one on.
    log_expected: (D), log E.
    """

    always: Tensor
    count: int
    cumulative: Tensor
    log_expected: Tensor

    @classmethod
    def by_weight(cls, weight: Tensor, num_samples: int) -> Drawn:
        """A sampler for positive weights (D) in float64."""
        num_classes = len(weight)
        descending, order = weight.sort(descending=True, stable=True)
        rest = descending.flip(0).cumsum(0).flip(0)
        free = num_samples - torch.arange(num_classes, device=weight.device)
        # If the j commonest classes are always taken, λ w of the next one is this.
        share = free * descending / rest
        samples = min(num_samples, num_classes)
        certain = num_classes if samples == num_classes else int((share <= 1).nonzero()[0])
        always, count = order[:certain], samples - certain
        expected = weight.index_fill(0, always, 0.0)
        if count:
            expected *= count / expected.sum()
        cumulative = expected.cumsum(0)
        cumulative[cumulative >= cumulative[-1]] = torch.inf
        return cls(always, count, cumulative, expected.index_fill(0, always, 1.0).log())

    @property
    def num_classes(self) -> int:
        return len(self.log_expected)

    def choose(self, target: Tensor, ignored: Tensor, dtype: torch.dtype) -> Negatives:
        wide, device = torch.float64, self.cumulative.device
        places = torch.arange(self.count, dtype=wide, device=device)
        # not in place, since torch.vmap may draw other numbers for each of its batches
        places = places + torch.rand(self.count, dtype=wide, device=device)
        drawn = torch.searchsorted(self.cumulative, places, right=True)
        classes = torch.cat([self.always, drawn])
        expected = self.log_expected[classes].to(dtype)
        return Negatives(classes.to(target.device), expected.to(target.device))

    def to(self, device: torch.device) -> Drawn:
        tables = ("always", "cumulative", "log_expected")
        return replace(self, **{name: getattr(self, name).to(device) for name in tables})


@dataclass(frozen=True, eq=False)
class InBatch(Sampler):
    """The targets of the other rows of the batch.

    E_k = (m − 1) q_k for m rows that are not ignored, where q_k is the share of class k among the
    targets of a whole training. Without shares E_k = 1, and nothing is corrected.

    log_share: (D), log q, or None.
    """

    log_share: Tensor | None

    @property
    def num_classes(self) -> int | None:
        return None if self.log_share is None else len(self.log_share)

    def choose(self, target: Tensor, ignored: Tensor, dtype: torch.dtype) -> Negatives:
        if self.log_share is None:
            expected = torch.zeros_like(target, dtype=dtype)
        else:
            others = (~ignored).sum() - 1
            share = self.log_share[target.to(self.log_share.device)].to(dtype)
            expected = share.to(target.device) + others.to(dtype).log()
        return Negatives(target, expected.masked_fill(ignored, torch.inf))

    def to(self, device: torch.device) -> InBatch:
        return InBatch(None if self.log_share is None else self.log_share.to(device))


def sampler_of(
    name: str, num_classes: int, num_samples: int | None, counts: Tensor | None, power: float
) -> Sampler:
    """The sampler of this name; num_samples is None for "in_batch" alone.

    Raises ValueError or TypeError for arguments that are wrong or have no meaning for it.
    """
    checks.one_of("sampler", name, _SAMPLERS)
    if num_samples is not None:
        num_samples = checks.at_least_one("num_samples", num_samples)
    checks.non_negative("power", power)
    if name != "frequency" and power != 1.0:
        raise ValueError(
            f"power has a meaning for sampler='frequency' alone, got {power} with {name!r}"
        )
    if counts is not None:
        counts = checks.class_counts(counts)
        checks.class_vector("counts", counts, num_classes)
    if name == "in_batch":
        if num_samples is not None:
            raise ValueError(
                f"num_samples has no meaning for sampler='in_batch', got {num_samples}; the "
                "negatives of a row are the targets of the other rows, so make the batch larger"
            )
        return InBatch(None if counts is None else (counts / counts.sum()).log())
    assert num_samples is not None
    if name == "log_uniform":
        if counts is not None:
            raise ValueError(
                "counts have no meaning for sampler='log_uniform', which numbers the classes from "
                "the commonest to the rarest; use sampler='frequency'"
            )
        number = torch.arange(1, num_classes + 1, dtype=torch.float64, device="cpu")
        weight = (1 / number).log1p()
        return Drawn.by_weight(weight, num_samples)
    if counts is None:
        raise ValueError(
            "sampler='frequency' needs counts, how often each class occurs in training; "
            "for classes that are numbered from the commonest to the rarest use 'log_uniform'"
        )
    weight = counts.pow(power)
    if not bool(((weight > 0) & weight.isfinite()).all()):
        raise ValueError(
            f"power must keep every count positive and finite, got {power}, with which they are "
            f"from {weight.min().item():g} to {weight.max().item():g}; use a smaller one"
        )
    return Drawn.by_weight(weight, num_samples)
