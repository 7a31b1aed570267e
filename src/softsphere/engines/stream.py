"""Probabilities, best classes and ranks of a large W, read in row chunks: no m × D tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from softsphere.losses import Loss

__all__ = ["Classes", "log_normaliser", "rank", "topk"]


@dataclass(frozen=True)
class Classes:
    """W as who has it gives it out.

    chunks(size): (slice of classes, W there) over all classes, `size` rows at a time
    num_classes: D
    pi: (D) or None
    loss: what ranks; its numerators if it is a distribution, the outputs otherwise
    """

    chunks: Callable[[int], Iterator[tuple[slice, Tensor]]]
    num_classes: int
    pi: Tensor | None
    loss: Loss

    def scores(self, o: Tensor, pi: Tensor | None) -> Tensor:
        """log(π t(o)), or o: what orders the classes of a row."""
        if not self.loss.normalised:
            return o
        log_t = self.loss.log_numerator(o)
        return log_t if pi is None else log_t + pi.log()

    def stream(self, H: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(slice of classes, scores there (m, ·)), about 32 MiB at a time."""
        size = max(1, min(self.num_classes, (8 << 20) // max(*H.shape, 1)))
        for part, rows in self.chunks(size):
            yield part, self.scores(H @ rows.mT, None if self.pi is None else self.pi[part])


def topk(classes: Classes, H: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores of each row, best first, and their classes: (m, k) each."""
    best = H.new_full((len(H), 0), -torch.inf)
    index = torch.empty(len(H), 0, dtype=torch.long, device=H.device)
    for part, scores in classes.stream(H):
        values, places = scores.topk(min(k, scores.shape[1]), dim=1)
        best, index = torch.cat([best, values], 1), torch.cat([index, places + part.start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, order)
    return best, index


def rank(classes: Classes, H: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """1 + the number of other classes whose score is not below or at own (m), the target's: (m).

    What is not a number is so behind all that is.
    """
    above = torch.zeros(len(H), dtype=torch.long, device=H.device)
    for part, scores in classes.stream(H):
        better = ~(scores <= own.unsqueeze(1))
        # not the target itself, whose score here may differ from `own` in the last digit
        row = ((target >= part.start) & (target < part.stop)).nonzero().squeeze(1)
        better[row, target[row] - part.start] = False
        above += better.sum(1)
    return above + 1


def log_normaliser(classes: Classes, H: Tensor) -> Tensor:
    """log Σ_k π_k t(o_k) of each row from the outputs themselves: (m)."""
    total = H.new_full((len(H),), -torch.inf)
    for _, scores in classes.stream(H):
        total = torch.logaddexp(total, scores.logsumexp(1))
    return total
