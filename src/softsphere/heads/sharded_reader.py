"""Predictions from a layer whose classes are sharded over ranks.

Each rank finds the answers of its own classes for the rows of all ranks, and each row's own rank
merges them. What is sent does not grow with the number of classes, except by `log_prob` of all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from softsphere import losses
from softsphere._torch import values_on_cpu, version_of
from softsphere.engines.chunked import CHUNKED
from softsphere.engines.cluster_shards import ClusterShards
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
    Checks,
    Reader,
    best_of,
    with_room_for_marks,
    without_marks,
)
from softsphere.heads.weight_reader import WeightReader
from softsphere.parallel import Agreement, Batch, Sharding, Shards, checksum
from softsphere.stats import Stats

__all__ = [
    "ReaderOfFactoredShard",
    "ReaderOfRank",
    "ReaderOfShard",
    "ShardedReader",
    "ShardedWeightReader",
]


class ReaderOfRank(Reader):
    """A reader of the classes of one rank, which it numbers by their places.

    It raises no error for infinite outputs, which only that rank would know of. It remembers them,
    and their scores are NaN.
    """

    infinite = False

    @property
    @abstractmethod
    def versions(self) -> tuple[Any, ...]:
        """Name the values of the weights; None where this rank cannot tell."""

    @abstractmethod
    def of_targets(self, H: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of one class for each row and its π, (2, m), and keys of the rows of W (m)."""

    @abstractmethod
    def better(self, H: Tensor, scores: Tensor, key: Tensor) -> Tensor:
        """How many classes have a better score than those of `of_targets`: (m)."""

    def ranked(self, scores: Tensor) -> Tensor:
        if not self.loss.normalised:
            return scores
        found = scores == torch.inf
        if values_on_cpu(scores):
            self.infinite |= bool(found.any())
        return scores.masked_fill(found, torch.nan)


class _OfShard(ReaderOfRank, WeightReader):
    """A reader of the rows of one rank."""

    @property
    def _measure(self) -> Tensor | None:
        """π, where classes are ranked by it."""
        return self.pi if self.loss.normalised else None

    def of_targets(self, H: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        pi = torch.ones_like(H[:, 0]) if self._measure is None else self._measure[target]
        o = (H * self.weight_rows(target)).sum(-1, keepdim=True)
        own = self.scores(o, None if self._measure is None else pi.unsqueeze(1))
        own = self.ranked(own).squeeze(1)
        return torch.stack([own, pi.to(own.dtype)]), self.row_keys(target)

    def better(self, H: Tensor, scores: Tensor, key: Tensor) -> Tensor:
        above, pi = torch.zeros_like(key), self._measure
        own, own_pi = scores.unsqueeze(2)
        for part, found in self.chunks_of_scores(H):
            twin = self.row_keys(part) == key.unsqueeze(1)
            better = (self.ranked(found) > own) & ~twin
            if pi is not None:
                better = better | (twin & (pi[part].to(scores.dtype) > own_pi))
            above = above + better.sum(1)
        return above


class ReaderOfShard(_OfShard, DenseReader):
    """A reader of the rows of one rank of a dense weight."""

    @property
    def versions(self) -> tuple[Any, ...]:
        return (version_of(self.W) if len(self.W) else None,)

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
    def versions(self) -> tuple[Any, ...]:
        return (self.weight.matrix.edition,)


class _Agreed(Checks):
    """The checks of a prediction on all ranks: an error or a difference on one is one on every."""

    def __init__(self, reader: ShardedReader, action: str) -> None:
        self.reader, self.action = reader, action
        self.agreed = Agreement(reader.shards.ranks, action)

    def __enter__(self) -> Checks:
        self.agreed.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.agreed.__exit__(kind, error, trace)
        if error is None:
            self.reader.batch = self.reader.shards.batch(self.agreed)

    def found(self, hidden: Tensor, *integers: Tensor | None, **facts: Any) -> None:
        reader = self.reader
        if reader.own.is_differentiated(hidden):
            raise RuntimeError(
                f"{self.action} of a layer with a process_group has no gradient; call it inside "
                "torch.no_grad()"
            )
        rows = hidden.reshape(-1, reader.in_features)
        beside = [x.reshape(len(rows), x.shape[-1]) for x in integers if x is not None]
        reader.shards.begin(self.agreed, reader.own.versions, rows, *beside)
        given = {k: checksum(v) if isinstance(v, Tensor) else v for k, v in facts.items()}
        self.agreed.same(loss=reader.loss, **given)


class ShardedReader(Reader):
    """A reader of the classes of all ranks.

    Args:
        own: of the classes of this rank.
        shards: of the layer.
        classes: which classes each rank has.
    """

    def __init__(
        self, own: ReaderOfRank, shards: Shards, classes: Sharding | ClusterShards
    ) -> None:
        super().__init__(own.loss, own.in_features, shards.sharding.num_classes, own.device)
        self.own, self.shards, self.classes = own, shards, classes
        self.batch = Batch(shards.ranks, (0,) * shards.ranks.size)

    def checked(self, action: str) -> Checks:
        return _Agreed(self, action)

    def is_differentiated(self, hidden: Tensor) -> bool:
        return False

    def check_normaliser(self, H: Tensor, log_norm: Tensor) -> Tensor:
        """See `Reader.check_normaliser`. An infinite output is an error on every rank."""
        self._refuse_infinite((log_norm == torch.inf).any())
        return log_norm

    def _refuse_infinite(self, found: Tensor | None = None) -> None:
        """Raises ValueError on every rank if one of them found an infinite output."""
        if found is None:
            found = torch.tensor(self.own.infinite, device=self.device)
        if int(self.shards.ranks.sum(found.to(torch.int64))):
            raise ValueError(INFINITE)

    def scores_of(self, H: Tensor, classes: Tensor) -> Tensor:
        place, own = self.classes.local(classes)
        every = self.batch.gathered(H)
        if not len(self.classes):
            return self.batch.scattered(every.new_zeros(len(every), len(classes)))
        return self.batch.scattered(torch.where(own, self.own.scores_of(every, place), 0.0))

    def every_score(self, H: Tensor) -> Tensor:
        result = H.new_empty(len(H), self.num_classes)
        for part, scores in self.chunks_of_scores(H):
            result[:, part] = scores
        return result

    def chunks_of_scores(self, H: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
        every, share = self.batch.gathered(H), self.classes.share
        size = max(1, min(share, SCORES // max(*every.shape, 1)))
        for first in range(0, share, size):
            last = min(first + size, len(self.classes))
            places = torch.arange(first, last, device=every.device)
            mine = every.new_zeros(len(every), size)
            if len(places):
                mine[:, : len(places)] = self.own.scores_of(every, places)
            for rank, scores in enumerate(self.batch.sent(mine)):
                number = min(size, self.classes.number_of(rank) - first)
                if number > 0:
                    yield self.classes.classes_of(rank, first, size), scores[:, :number]

    def topk(self, H: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        every, left_out = self.batch.gathered(H), None
        if exclude is not None:
            excluded = self.batch.gathered(exclude)
            place, mine = self.classes.local(excluded.clamp_min(0))
            left_out = torch.where(mine & (excluded >= 0), place, -1)
        width = min(k, self.classes.share)
        marked = every.new_full((len(every), width), torch.nan)
        index = torch.full((len(every), width), -1, device=H.device)
        own = min(width, len(self.classes))
        if own:
            best, places = self.own.topk(every, own, left_out)
            best = with_room_for_marks(best)
            if left_out is not None:
                hit = (places.unsqueeze(2) == left_out.unsqueeze(1)).any(2)
                best = best.masked_fill(hit, torch.nan)
            marked[:, :own], index[:, :own] = best, self.classes.named(places)
        self._refuse_infinite()
        values = self.batch.sent(marked).transpose(0, 1).flatten(1)
        found = self.batch.sent(index).transpose(0, 1).flatten(1)
        best, order = best_of(values.clone(), k)
        return without_marks(best), found.gather(1, order)

    def rank(self, H: Tensor, target: Tensor) -> Tensor:
        every, targets = self.batch.gathered(H), self.batch.gathered(target)
        place, mine = self.classes.local(targets)
        score, key = every.new_zeros(2, len(every)), torch.zeros_like(targets)
        above = torch.zeros_like(targets)
        if len(self.classes):
            score[:, mine], key[mine] = self.own.of_targets(every[mine], place[mine])
        score, key = self.shards.ranks.sum(score), self.shards.ranks.sum(key)
        if len(self.classes):
            above = self.own.better(every, score, key)
        self._refuse_infinite()
        above = self.batch.scattered(above)
        return torch.where(score[0][self.batch.own].isnan(), self.num_classes, above + 1)


class ShardedWeightReader(ShardedReader):
    """A reader of a weight that has a row for each class of all ranks."""

    own: ReaderOfShard | ReaderOfFactoredShard

    def __init__(self, own: ReaderOfShard | ReaderOfFactoredShard, shards: Shards) -> None:
        super().__init__(own, shards, shards.sharding)

    def rows_of(self, hidden: Tensor) -> Tensor:
        return self.own.rows_of(hidden)

    def log_normaliser(self, H: Tensor) -> Tensor:
        if isinstance(self.own, ReaderOfFactoredShard):
            # from sums over all rows, which every rank has; but where those have lost the digits of
            # a row, all ranks must compute with it
            return self.own.log_normaliser(self.batch.gathered(H))[self.batch.own]
        if not isinstance(self.loss, losses.Normalised):
            return H.new_zeros(len(H))
        layer = Affine(self.own.W, self.own.b)
        find = ShardedStatistics(
            layer, self.own.pi, self.shards, False, self.own.options, self.own.sums
        )
        none = torch.empty(len(H), 0, dtype=torch.long, device=H.device)
        x, _ = find.of_rows(H[:, : self.in_features], none, self.batch)
        return self.loss.log_normaliser(x.s, x.q, x.mass)
