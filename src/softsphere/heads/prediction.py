"""Prediction from hidden states by a layer that has W, read in row chunks."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere.engines import stream
from softsphere.modules import TopK

__all__ = ["OutputLayer"]


Method = TypeVar("Method", bound=Callable[..., Any])


def exactly(method: Method) -> Method:
    """A prediction without a gradient, and with the same digits inside autocast as outside."""

    @functools.wraps(method)
    def run(self: OutputLayer, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        checks.hidden(hidden, self.in_features)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return method(self, hidden, *args, **kwargs)

    return cast(Method, run)


class OutputLayer(nn.Module, ABC):
    """log_prob, topk, predict and rank of a layer that says how its W is read.

    Rows have w numbers: d, or d + 1 where a bias is one more column of W whose input is 1.
    """

    loss: losses.Loss
    in_features: int
    num_classes: int

    @property
    @abstractmethod
    def base_measure(self) -> Tensor | None:
        """π (D), or None for one everywhere."""

    @abstractmethod
    def rows_of(self, hidden: Tensor) -> Tensor:
        """hidden as (m, w) in the dtype of what is computed with it."""

    @abstractmethod
    def weight_rows(self, classes: Tensor) -> Tensor:
        """W of the given classes (n): (n, w)."""

    @abstractmethod
    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """(slice of classes, W there) over all classes, `size` rows at a time."""

    @abstractmethod
    def log_normaliser(self, H: Tensor) -> Tensor:
        """log Σ_k π_k t(o_k) of each row: (m); 0 for a loss without it."""

    def classes(self) -> stream.Classes:
        """What prediction streams over."""
        return stream.Classes(self.weight_chunks, self.num_classes, self.base_measure, self.loss)

    @exactly
    def log_prob(self, hidden: Tensor, classes: Tensor | None = None) -> Tensor:
        """log f_k: (…, D), or (…, n) of the given classes (n) alone.

        Raises: TypeError for a loss that is not a distribution.
        """
        H = self.rows_of(hidden)
        self.loss.log_numerator(H[:0])  # says so, where there is none
        log_norm = self.log_normaliser(H).unsqueeze(1)
        if classes is not None:
            checks.classes(classes, self.num_classes)
            o, pi = H @ self.weight_rows(classes).mT, self.base_measure
            result = self.classes().scores(o, None if pi is None else pi[classes]) - log_norm
        else:
            result = H.new_empty(len(H), self.num_classes)
            for part, scores in self.classes().stream(H):
                result[:, part] = scores - log_norm
        return result.view(*hidden.shape[:-1], -1)

    @exactly
    def topk(self, hidden: Tensor, k: int) -> TopK:
        """The k best classes of each row, best first; values are log-probabilities, or the outputs
        where the loss is not a distribution. W is read once, in chunks."""
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be from 1 to num_classes = {self.num_classes}, got {k}")
        H = self.rows_of(hidden)
        best, index = stream.topk(self.classes(), H, k)
        best = best - self.log_normaliser(H).unsqueeze(1)
        shape = (*hidden.shape[:-1], k)
        return TopK(best.view(shape), index.view(shape))

    def predict(self, hidden: Tensor) -> Tensor:
        """The best class of each row."""
        return self.topk(hidden, 1).indices.squeeze(-1)

    @exactly
    def rank(self, hidden: Tensor, target: Tensor) -> Tensor:
        """1 + the number of classes that are better than the target: (…)."""
        checks.rows_target(hidden.shape[:-1], target)
        checks.classes(target, self.num_classes, "target")
        H, t, pi = self.rows_of(hidden), target.reshape(-1), self.base_measure
        o = (H * self.weight_rows(t)).sum(-1)
        own = self.classes().scores(o, None if pi is None else pi[t])
        return stream.rank(self.classes(), H, t, own).view(target.shape)
