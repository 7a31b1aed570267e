"""Predictions from an output layer whose classes are read in chunks: no m × D tensor.

Under autograd, torch.func transforms and torch.export, all outputs are computed at once by plain
operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks
from softsphere._torch import values_on_cpu
from softsphere.losses import Loss

__all__ = [
    "INFINITE",
    "SCORES",
    "Checks",
    "Reader",
    "best_of",
    "with_room_for_marks",
    "without_marks",
]

# The scores that are in memory at once, for all rows of H together.
SCORES = 8 << 20
INFINITE = (
    "the outputs of the layer must be finite for this loss, but one is infinite or its square "
    "overflows; a −inf in bias or weight does not forbid a class here, since t(o) grows again: "
    "keep them finite, and pass mask=… to the loss and the predictions of a LinearSphericalLoss"
)


class Checks:
    """The checks of a prediction; a reader of several ranks compares them over the ranks.

    It is a class, since the compiler of torch 2.6 does not trace a contextmanager.
    """

    def __enter__(self) -> Checks:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        pass

    def found(self, hidden: Tensor, *integers: Tensor | None, **facts: Any) -> None:
        """Takes what they found: hidden, integers (…, n) beside its rows, and facts by name."""


class Reader(ABC):
    """The weight and base measure of an output layer, taken once for one call.

    Args:
        loss: what ranks the classes.
        in_features: d.
        num_classes: D.
        device: of the weight.
    """

    def __init__(
        self, loss: Loss, in_features: int, num_classes: int, device: torch.device
    ) -> None:
        self.loss, self.in_features, self.num_classes = loss, in_features, num_classes
        self.device = device

    def checked(self, action: str) -> Checks:
        """A context for the checks of a prediction, which run before anything is computed."""
        return Checks()

    def check(self, hidden: Tensor) -> None:
        """Raises ValueError or TypeError unless hidden (…, d) can be multiplied with W."""
        checks.hidden(hidden, self.in_features)
        if hidden.device != self.device:
            raise ValueError(
                f"hidden must be on the device of the weight, {self.device}, got {hidden.device}; "
                "use hidden.to(head.weight.device)"
            )

    def masked(self, mask: Any, hidden: Tensor) -> Reader:
        """A reader of the classes where mask (D) is True, after a check of it.

        Raises TypeError for a layer that takes none.
        """
        raise TypeError(
            "mask cannot be used with this layer; use a LinearSphericalLoss without a "
            "process_group, whose loss and predictions take a mask of classes"
        )

    @abstractmethod
    def rows_of(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, d) as rows (m, w), in the dtype of the computation."""

    @abstractmethod
    def scores_of(self, H: Tensor, classes: Tensor) -> Tensor:
        """The scores of the given classes (n): (m, n)."""

    @abstractmethod
    def every_score(self, H: Tensor) -> Tensor:
        """The scores of all classes at once: (m, D)."""

    def every_log_prob(self, H: Tensor) -> Tensor:
        """The log-probabilities of all classes at once: (m, D)."""
        return torch.log_softmax(self.every_score(H), -1)

    @abstractmethod
    def chunks_of_scores(self, H: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Classes and their scores (m, ·), chunk by chunk. The caller may write over them."""

    @abstractmethod
    def log_normaliser(self, H: Tensor) -> Tensor:
        """log Σ_k π_k t(o_k) of each row: (m); 0 for a loss that is not a distribution."""

    @abstractmethod
    def is_differentiated(self, hidden: Tensor) -> bool:
        """Whether autograd records a computation with hidden and the weight."""

    @abstractmethod
    def rank(self, H: Tensor, target: Tensor) -> Tensor:
        """1 + the number of classes with a better score than the target (m): (m).

        NaN scores rank last: they are never better, and a target with one has rank D. Classes with
        equal rows of the weight are compared by π alone, since their scores may differ in the last
        digits.
        """

    def ranked(self, scores: Tensor) -> Tensor:
        """Scores with NaN for those of +∞, which infinite outputs of either sign have.

        On a CPU, raises ValueError instead. A loss that is not a distribution ranks by the outputs
        themselves, and keeps them.
        """
        if not self.loss.normalised:
            return scores
        infinite = scores == torch.inf
        if not values_on_cpu(scores):
            return scores.masked_fill(infinite, torch.nan)
        if bool(infinite.any()):
            raise ValueError(INFINITE)
        return scores

    def check_normaliser(self, H: Tensor, log_norm: Tensor) -> Tensor:
        """Returns a log-normaliser (m). On a CPU, raises ValueError if outputs are infinite."""
        if values_on_cpu(log_norm) and not bool(log_norm.isfinite().all()):
            if bool((log_norm == torch.inf).any()):
                raise ValueError(INFINITE)
            for _, scores in self.chunks_of_scores(H.detach()):
                self.ranked(scores)
        return log_norm

    def topk(self, H: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best scores of each row, best first, and their classes: (m, k) each.

        NaN scores rank last. The classes exclude (m, n) of a row, −1 for none, are not among them.
        """
        best = H.new_empty(H.shape[0], 0)
        index = torch.empty(H.shape[0], 0, dtype=torch.long, device=H.device)
        for part, scores in self.chunks_of_scores(H):
            scores = self.ranked(scores)
            if exclude is not None:
                scores = _excluding(scores, self._places(part, exclude))
            values, places = best_of(scores, k)
            best, order = best_of(torch.cat([best, values], 1), k)
            classes = part[places] if isinstance(part, Tensor) else places + part.start
            index = torch.cat([index, classes], 1).gather(1, order)
        return (best if exclude is None else without_marks(best)), index

    def _places(self, part: Tensor | slice, classes: Tensor) -> Tensor:
        """Where the given classes, −1 for none, are within a part of all classes.

        It is outside the part for other classes.
        """
        if isinstance(part, slice):
            start: int = part.start
            return classes - start
        place = torch.full((self.num_classes + 1,), -1, device=part.device)
        place[part] = torch.arange(len(part), device=part.device)
        return place[classes]  # −1 looks at the last entry, which is that of no class


def _excluding(scores: Tensor, places: Tensor) -> Tensor:
    """Scores (m, n) that are NaN at the given places (m, ·) of each row.

    NaN ranks last, so scores that are NaN become −∞ here, and those of −∞ the lowest number; see
    `without_marks`. Places outside [0, n) are other classes or padding.
    """
    n = scores.shape[1]
    # A column beyond the scores, which is taken off again.
    spare = torch.where((places >= 0) & (places < n), places, n)
    marked = nn.functional.pad(with_room_for_marks(scores), (0, 1)).scatter(1, spare, torch.nan)
    return marked.narrow(1, 0, n)


def with_room_for_marks(scores: Tensor) -> Tensor:
    """Scores without NaN, which then marks what ranks behind all of them; see `_excluding`."""
    lowest = torch.finfo(scores.dtype).min
    return torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=lowest)


def without_marks(scores: Tensor) -> Tensor:
    """Scores as they were before `with_room_for_marks`; those that were marked are NaN."""
    lowest = torch.finfo(scores.dtype).min
    found = torch.where(scores == -torch.inf, torch.nan, scores)
    return torch.where(scores == lowest, -torch.inf, found)


def best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each row, or all if there are fewer, and their places.

    It writes over the scores. NaN is the largest number to topk, and comes last among the smallest
    of −scores.
    """
    values, places = scores.neg_().topk(min(k, scores.shape[1]), dim=1, largest=False)
    return -values, places
