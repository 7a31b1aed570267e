"""Predictions from an output layer whose weight is read in chunks of classes: no m × D tensor.

Under autograd, torch.func transforms and torch.export, all outputs are computed at once by plain
operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from softsphere import checks
from softsphere._torch import exporting, transformed, values_on_cpu
from softsphere.losses import Loss

__all__ = ["Reader", "keys_of_rows"]

# The scores that are in memory at once, for all rows of H together.
_SCORES = 8 << 20
# The keys of rows are polynomials at this number modulo 2⁶⁴.
_BASE = 0x5851F42D4C957F2D
_INFINITE = (
    "the outputs of the layer must be finite for this loss, but one is infinite or its square "
    "overflows; a −inf in bias or weight does not forbid a class here, since t(o) grows again: "
    "keep them finite, pass mask=… to the loss, and take predictions among the classes that "
    "take part from log_prob(hidden, classes)"
)


class Reader(ABC):
    """The weight and base measure of an output layer, taken once for one call.

    Each row has w entries. w = d without a bias. With a bias, W has one more column, whose input is
    1, and w = d + 1.

    Args:
        loss: what ranks the classes.
        in_features: d.
        num_classes: D.
        pi: base measure (D), or None for π = 1.
        device: of the weight.
    """

    def __init__(
        self,
        loss: Loss,
        in_features: int,
        num_classes: int,
        pi: Tensor | None,
        device: torch.device,
    ) -> None:
        self.loss, self.in_features, self.num_classes, self.pi = loss, in_features, num_classes, pi
        self.device = device

    def check(self, hidden: Tensor) -> None:
        """Raises ValueError or TypeError unless hidden (…, d) can be multiplied with W."""
        checks.hidden(hidden, self.in_features)
        if hidden.device != self.device:
            raise ValueError(
                f"hidden must be on the device of the weight, {self.device}, got {hidden.device}; "
                "use hidden.to(head.weight.device)"
            )

    @abstractmethod
    def rows_of(self, hidden: Tensor) -> Tensor:
        """Hidden states (…, d) as rows (m, w), in the dtype of the computation."""

    @abstractmethod
    def weight_rows(self, classes: Tensor) -> Tensor:
        """The rows of W of the given classes (n): (n, w)."""

    @abstractmethod
    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """All rows of W with their classes, `size` at a time."""

    @abstractmethod
    def row_keys(self, classes: Tensor | slice) -> Tensor:
        """Integers (n) for the rows of W of the given classes; see `keys_of_rows`."""

    @abstractmethod
    def outputs(self, H: Tensor, classes: Tensor | None = None) -> Tensor:
        """H Wᵀ (m, D), or (m, n) of the given classes (n), with gradients with respect to H and
        the weight."""

    @abstractmethod
    def log_normaliser(self, H: Tensor) -> Tensor:
        """log Σ_k π_k t(o_k) of each row: (m); 0 for a loss that is not a distribution."""

    @abstractmethod
    def is_differentiated(self, hidden: Tensor) -> bool:
        """Whether autograd records a computation with hidden and the weight."""

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

    def scores_of(self, H: Tensor, classes: Tensor) -> Tensor:
        """The scores of the given classes (n): (m, n)."""
        return self.scores(self.outputs(H, classes), None if self.pi is None else self.pi[classes])

    def every_score(self, H: Tensor) -> Tensor:
        """The scores of all classes at once: (m, D)."""
        return self.scores(self.outputs(H), self.pi)

    def chunks_of_scores(self, H: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Classes and their scores (m, ·), chunk by chunk."""
        if exporting():
            # The number of chunks would depend on the number of rows.
            yield slice(0, self.num_classes), self.every_score(H)
            return
        size = max(1, min(self.num_classes, _SCORES // max(*H.shape, 1)))
        for part, rows in self.weight_chunks(size):
            yield part, self.scores(H @ rows.mT, None if self.pi is None else self.pi[part])

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
            raise ValueError(_INFINITE)
        return scores

    def check_normaliser(self, H: Tensor, log_norm: Tensor) -> Tensor:
        """Returns a log-normaliser (m). On a CPU, raises ValueError if outputs are infinite."""
        if values_on_cpu(log_norm) and not bool(log_norm.isfinite().all()):
            if bool((log_norm == torch.inf).any()):
                raise ValueError(_INFINITE)
            for _, scores in self.chunks_of_scores(H.detach()):
                self.ranked(scores)
        return log_norm

    def topk(self, H: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best scores of each row, best first, and their classes: (m, k) each.

        NaN scores rank last.
        """
        best = H.new_empty(H.shape[0], 0)
        index = torch.empty(H.shape[0], 0, dtype=torch.long, device=H.device)
        for part, scores in self.chunks_of_scores(H):
            values, places = _best(self.ranked(scores), k)
            best, order = _best(torch.cat([best, values], 1), k)
            index = torch.cat([index, places + part.start], 1).gather(1, order)
        return best, index

    def rank(self, H: Tensor, target: Tensor) -> Tensor:
        """1 + the number of classes with a better score than the target (m): (m).

        NaN scores rank last: they are never better, and a target with one has rank D. Classes with
        equal rows of W are compared by π alone, since their scores may differ in the last digits.
        """
        o = (H * self.weight_rows(target)).sum(-1)
        pi = self.pi if self.loss.normalised else None
        own_pi = None if pi is None else pi[target].unsqueeze(1)
        own = self.ranked(self.scores(o.unsqueeze(1), own_pi))
        # PyTorch 2.6 has no rule for bits of rows that vmap maps over.
        every = transformed()
        own_key = self.row_keys(slice(None))[target] if every else self.row_keys(target)
        above = torch.zeros_like(target)
        for part, scores in self.chunks_of_scores(H):
            twin = self.row_keys(part) == own_key.unsqueeze(1)
            better = (self.ranked(scores) > own) & ~twin
            if pi is not None and own_pi is not None:
                better = better | (twin & (pi[part] > own_pi))
            above = above + better.sum(1)
        return torch.where(own.squeeze(1).isnan(), self.num_classes, above + 1)

    def log_normaliser_of_outputs(self, H: Tensor) -> Tensor:
        """log Σ_k π_k t(o_k) of each row from the outputs themselves: (m)."""
        total = H.new_full((H.shape[0],), -torch.inf)
        for _, scores in self.chunks_of_scores(H):
            total = torch.logaddexp(total, scores.logsumexp(1))
        return total


def keys_of_rows(*blocks: Tensor) -> Tensor:
    """Integers (n) for rows in blocks of columns (n, w), equal for equal rows on every machine.

    Different rows have different ones, but for a chance of at most 2⁻⁴⁰ for each pair.
    """
    key = torch.zeros(blocks[0].shape[0], dtype=torch.long, device=blocks[0].device)
    for x in blocks:
        # The number of pieces, which stay in the processor's cache, would be part of an export.
        pieces = [x] if exporting() else x.split(1024)
        key = key * _BASE + torch.cat([_keys(piece) for piece in pieces])
    return key


def _keys(rows: Tensor) -> Tensor:
    """Σ_j bits_j Bʲ⁺¹ modulo 2⁶⁴, where −0 has the bits of 0."""
    width = rows.shape[1] * rows.element_size() // 4
    bits = (rows + 0.0).flatten().view(torch.int32).view(len(rows), width)
    powers = torch.full((width,), _BASE, dtype=torch.long, device=rows.device).cumprod(0)
    # Only a CPU has a product of integer matrices.
    return bits.long() @ powers if bits.device.type == "cpu" else (bits * powers).sum(-1)


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each row, or all if there are fewer, and their places.

    It writes over the scores. NaN is the largest number to topk, and comes last among the smallest
    of −scores.
    """
    values, places = scores.neg_().topk(min(k, scores.shape[1]), dim=1, largest=False)
    return -values, places
