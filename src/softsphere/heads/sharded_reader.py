"""Predictions from a weight whose rows are sharded over ranks.

Each rank finds the answers of its own classes for the rows of all ranks, and each row's own rank
merges them. What is sent does not grow with the number of classes, except by `log_prob` of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from softsphere import losses
from softsphere._torch import values_on_cpu, version_of
from softsphere.engines.chunked import CHUNKED
from softsphere.engines.dispatch import settings
from softsphere.engines.engine import Inputs
from softsphere.engines.gram import guarded_statistics
from softsphere.functional.on_linear import Affine
from softsphere.functional.on_shards import ShardedStatistics
from softsphere.heads.dense_reader import DenseReader
from softsphere.heads.factored_reader import FactoredReader
from softsphere.heads.reader import (
    INFINITE,
    SCORES,
    Reader,
    best_of,
    with_room_for_marks,
    without_marks,
)
from softsphere.parallel import Agreement, Batch, Shards, checksum
from softsphere.stats import Stats

__all__ = ["ReaderOfFactoredShard", "ReaderOfShard", "ShardedReader"]


class _OfShard(Reader):
    """A reader of the rows of one rank.

    It raises no error for infinite outputs, which only that rank would know of. It remembers them,
    and their scores are NaN.
    """

    infinite = False

    def ranked(self, scores: Tensor) -> Tensor:
        if not self.loss.normalised:
            return scores
        found = scores == torch.inf
        if values_on_cpu(scores):
            self.infinite |= bool(found.any())
        return scores.masked_fill(found, torch.nan)


class ReaderOfShard(_OfShard, DenseReader):
    """A reader of the rows of one rank of a dense weight."""

    @property
    def version(self) -> Any:
        """Names the value of W; None where this rank has no row of it."""
        return version_of(self.W) if len(self.W) else None

    def sums(self, H: Tensor, target: Tensor) -> Stats:
        """s and q of rows H (m, d) over the classes of this rank."""
        statistics = guarded_statistics if len(H) > self.in_features else CHUNKED.statistics
        pi = None if self.pi is None else self.pi.to(H.dtype)
        x = Inputs(H, self.W, self.b, target, pi)
        s, q, c = statistics(x, settings(x, self.options, centred=False))
        return Stats(s, q, c, float(self.num_classes))


class ReaderOfFactoredShard(_OfShard, FactoredReader):
    """A reader of the rows of one rank of a factored weight."""

    @property
    def version(self) -> Any:
        return self.weight.matrix.edition


class ShardedReader(Reader):
    """A reader of the rows of all ranks.

    Args:
        own: of the rows of this rank.
        shards: of the layer.
    """

    def __init__(self, own: ReaderOfShard | ReaderOfFactoredShard, shards: Shards) -> None:
        super().__init__(own.loss, own.in_features, shards.sharding.num_classes, own.device)
        self.own, self.shards, self.sharding = own, shards, shards.sharding
        self.batch = Batch(shards.ranks, (0,) * shards.ranks.size)

    @contextmanager
    def checked(self, action: str) -> Iterator[Callable[..., None]]:
        with Agreement(self.shards.ranks, action) as agreed:

            def found(hidden: Tensor, *integers: Tensor | None, **facts: Any) -> None:
                if self.own.is_differentiated(hidden):
                    raise RuntimeError(
                        f"{action} of a layer with a process_group has no gradient; call it inside "
                        "torch.no_grad()"
                    )
                rows = hidden.reshape(-1, self.in_features)
                beside = [x.reshape(len(rows), x.shape[-1]) for x in integers if x is not None]
                self.shards.begin(agreed, self.own.version, rows, *beside)
                given = {k: checksum(v) if isinstance(v, Tensor) else v for k, v in facts.items()}
                agreed.same(loss=self.loss, **given)

            yield found
        self.batch = self.shards.batch(agreed)

    def rows_of(self, hidden: Tensor) -> Tensor:
        return self.own.rows_of(hidden)

    def is_differentiated(self, hidden: Tensor) -> bool:
        return False

    def log_normaliser(self, H: Tensor) -> Tensor:
        if isinstance(self.own, ReaderOfFactoredShard):
            return self.own.log_normaliser(H)  # from sums over all rows, which every rank has
        if not isinstance(self.loss, losses.Normalised):
            return H.new_zeros(len(H))
        layer = Affine(self.own.W, self.own.b)
        find = ShardedStatistics(
            layer, self.own.pi, self.shards, False, self.own.options, self.own.sums
        )
        none = torch.empty(len(H), 0, dtype=torch.long, device=H.device)
        x, _ = find.of_rows(H[:, : self.in_features], none, self.batch)
        return self.loss.log_normaliser(x.s, x.q, x.mass)

    def check_normaliser(self, H: Tensor, log_norm: Tensor) -> Tensor:
        """See `Reader.check_normaliser`. An infinite output is an error on every rank."""
        self._refuse_infinite((log_norm == torch.inf).any())
        return log_norm

    def _refuse_infinite(self, found: Tensor) -> None:
        """Raises ValueError on every rank if one of them found an infinite output."""
        if int(self.shards.ranks.sum(found.to(torch.int64))):
            raise ValueError(INFINITE)

    def scores_of(self, H: Tensor, classes: Tensor) -> Tensor:
        place, own = self.sharding.local(classes)
        every = self.batch.gathered(H)
        if not len(self.sharding):
            return self.batch.scattered(every.new_zeros(len(every), len(classes)))
        return self.batch.scattered(torch.where(own, self.own.scores_of(every, place), 0.0))

    def every_score(self, H: Tensor) -> Tensor:
        return torch.cat([scores for _, scores in self.chunks_of_scores(H)], 1)

    def chunks_of_scores(self, H: Tensor) -> Iterator[tuple[slice, Tensor]]:
        every = self.batch.gathered(H)
        size = max(1, min(self.sharding.share, SCORES // max(*every.shape, 1)))
        for first in range(0, self.sharding.share, size):
            classes = torch.arange(first, min(first + size, len(self.sharding)))
            mine = every.new_zeros(len(every), size)
            if len(classes):
                mine[:, : len(classes)] = self.own.scores_of(every, classes.to(every.device))
            for rank, scores in enumerate(self.batch.sent(mine)):
                start = self.sharding.start_of(rank) + first
                stop = min(start + size, self.sharding.start_of(rank + 1))
                if stop > start:
                    yield slice(start, stop), scores[:, : stop - start]

    def topk(self, H: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        every = self.batch.gathered(H)
        left_out = None if exclude is None else self.batch.gathered(exclude) - self.sharding.start
        width = min(k, self.sharding.share)
        marked = every.new_full((len(every), width), torch.nan)
        index = torch.full((len(every), width), -1, device=H.device)
        own = min(width, len(self.sharding))
        if own:
            best, classes = self.own.topk(every, own, left_out)
            best = with_room_for_marks(best)
            if left_out is not None:
                hit = (classes.unsqueeze(2) == left_out.unsqueeze(1)).any(2)
                best = best.masked_fill(hit, torch.nan)
            marked[:, :own], index[:, :own] = best, classes + self.sharding.start
        self._refuse_infinite(torch.tensor(self.own.infinite, device=H.device))
        values = self.batch.sent(marked).transpose(0, 1).flatten(1)
        found = self.batch.sent(index).transpose(0, 1).flatten(1)
        best, order = best_of(values.clone(), k)
        return without_marks(best), found.gather(1, order)

    def rank(self, H: Tensor, target: Tensor) -> Tensor:
        every, targets = self.batch.gathered(H), self.batch.gathered(target)
        place, mine = self.sharding.local(targets)
        score = every.new_zeros(2, len(every))
        key = torch.zeros_like(targets)
        with_pi = self.own.pi is not None and self.loss.normalised
        if len(self.sharding):
            pi = self.own.pi[place] if self.own.pi is not None else torch.ones_like(score[0])
            o = (every * self.own.weight_rows(place)).sum(-1)
            own = self.own.ranked(
                self.own.scores(o.unsqueeze(1), pi.unsqueeze(1) if with_pi else None)
            )
            score = torch.where(mine, torch.stack([own.squeeze(1), pi.to(own.dtype)]), 0.0)
            key = torch.where(mine, self.own.row_keys(place), 0)
        score, key = self.shards.ranks.sum(score), self.shards.ranks.sum(key)
        above = torch.zeros_like(targets)
        if len(self.sharding):
            for part, scores in self.own.chunks_of_scores(every):
                twin = self.own.row_keys(part) == key.unsqueeze(1)
                better = (self.own.ranked(scores) > score[0].unsqueeze(1)) & ~twin
                if with_pi and self.own.pi is not None:
                    pi = self.own.pi[part].to(score.dtype)
                    better = better | (twin & (pi > score[1].unsqueeze(1)))
                above = above + better.sum(1)
        self._refuse_infinite(torch.tensor(self.own.infinite, device=H.device))
        above = self.batch.scattered(above)
        return torch.where(score[0][self.batch.own].isnan(), self.num_classes, above + 1)
