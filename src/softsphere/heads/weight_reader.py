"""Predictions from an output layer whose outputs are the products of rows with one weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from softsphere._torch import exporting, transformed
from softsphere.heads.reader import SCORES, Reader
from softsphere.losses import Loss

__all__ = ["WeightReader"]


class WeightReader(Reader):
    """A reader of a weight with one row for each class, and of its base measure.

    Each row has w entries. w = d without a bias. With a bias, W has one more column, whose input is
    1, and w = d + 1.

    Args:
        loss, in_features, num_classes, device: see `Reader`.
        pi: base measure (D), or None for π = 1.
    """

    def __init__(
        self,
        loss: Loss,
        in_features: int,
        num_classes: int,
        pi: Tensor | None,
        device: torch.device,
    ) -> None:
        super().__init__(loss, in_features, num_classes, device)
        self.pi = pi
        # (D), True for classes that take part; None if all do
        self.mask: Tensor | None = None

    @abstractmethod
    def weight_rows(self, classes: Tensor) -> Tensor:
        """The rows of W of the given classes (n): (n, w)."""

    @abstractmethod
    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """All rows of W with their classes, `size` at a time."""

    @abstractmethod
    def row_keys(self, classes: Tensor | slice) -> Tensor:
        """Integers (n) for the rows of W of the given classes; see `row_keys.keys_of_rows`."""

    @abstractmethod
    def outputs(self, H: Tensor, classes: Tensor | None = None) -> Tensor:
        """H Wᵀ (m, D), or (m, n) of the given classes (n), with gradients with respect to H and
        the weight."""

    def scores(self, o: Tensor, pi: Tensor | None) -> Tensor:
        """Scores by which classes are ranked: log(π t(o)).

        They are o for a loss that is not a distribution.
        """
        if not self.loss.normalised:
            return o
        log_t = self.loss.log_numerator(o)
        if pi is None:
            return log_t
        # The wider dtype, in which neither π nor its logarithm loses digits.
        wide = torch.promote_types(pi.dtype, log_t.dtype)
        return log_t + pi.to(wide).log().to(log_t.dtype)

    def _scores_at(self, o: Tensor, classes: Tensor | slice) -> Tensor:
        """The scores of classes (n) from their outputs (m, n); −∞ for those masked out."""
        scores = self.scores(o, None if self.pi is None else self.pi[classes])
        return scores if self.mask is None else scores.masked_fill(~self.mask[classes], -torch.inf)

    def scores_of(self, H: Tensor, classes: Tensor) -> Tensor:
        return self._scores_at(self.outputs(H, classes), classes)

    def every_score(self, H: Tensor) -> Tensor:
        return self._scores_at(self.outputs(H), slice(None))

    def chunks_of_scores(self, H: Tensor) -> Iterator[tuple[slice, Tensor]]:
        if exporting():
            # The number of chunks would depend on the number of rows.
            yield slice(0, self.num_classes), self.every_score(H)
            return
        size = max(1, min(self.num_classes, SCORES // max(*H.shape, 1)))
        for part, rows in self.weight_chunks(size):
            yield part, self._scores_at(H @ rows.mT, part)

    def rank(self, H: Tensor, target: Tensor) -> Tensor:
        o = (H * self.weight_rows(target)).sum(-1)
        pi = self.pi if self.loss.normalised else None
        own_pi = None if pi is None else pi[target].unsqueeze(1)
        own = self.ranked(self.scores(o.unsqueeze(1), own_pi))
        if self.mask is not None:
            own = own.masked_fill(~self.mask[target].unsqueeze(1), -torch.inf)
        # PyTorch 2.6 has no rule for bits of rows that vmap maps over.
        every = transformed()
        own_key = self.row_keys(slice(None))[target] if every else self.row_keys(target)
        above = torch.zeros_like(target)
        for part, scores in self.chunks_of_scores(H):
            twin = self.row_keys(part) == own_key.unsqueeze(1)
            better = (self.ranked(scores) > own) & ~twin
            if pi is not None and own_pi is not None:
                better = better | (twin & (pi[part] > own_pi))
            if self.mask is not None:
                better = better & self.mask[part]
            above = above + better.sum(1)
        return torch.where(own.squeeze(1).isnan(), self.num_classes, above + 1)

    def log_normaliser_of_outputs(self, H: Tensor) -> Tensor:
        """log Σ_k π_k t(o_k) of each row from the outputs themselves: (m)."""
        total = H.new_full((H.shape[0],), -torch.inf)
        for _, scores in self.chunks_of_scores(H):
            total = torch.logaddexp(total, scores.logsumexp(1))
        return total
