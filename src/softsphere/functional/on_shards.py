r"""The losses of a linear output layer whose rows of W are sharded over ranks.

Each rank has D_r classes. It gathers the rows of all ranks, and finds for each of them the sums
over its own classes with the engine of a layer without a process group:

    s = Σ_r s_r        q = Σ_r q_r        c = c_r of the rank r that owns the target.

For a loss that does not see a shift, each rank takes off the mean output of its own classes. With
its mean row w̄_r, its mass M_r, the mean row w̄ of all and δ_r = (w̄_r − w̄)·h,

    q = Σ_r (q_r + M_r δ_r²)        c = c_r + δ_r,

where nothing large cancels. Each rank then has the statistics of its own rows, and the losses of
all are added. A step sends O(m d + d) numbers, whatever D is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere._torch import version_of
from softsphere.engines.accumulation import Accumulation
from softsphere.engines.dispatch import linear_statistics
from softsphere.engines.engine import mass_of
from softsphere.engines.options import LinearSphericalOptions
from softsphere.engines.weight import sum_dtype
from softsphere.functional.conventions import Conventions, mixed_precision
from softsphere.functional.on_linear import Affine, Statistics, autocast
from softsphere.functional.on_logits import spherical_value
from softsphere.functional.rows_over_ranks import LossOverRanks, WeightsOfRank, entries_of_rank
from softsphere.parallel import (
    Agreement,
    Batch,
    Shards,
    all_rows,
    own_sums,
    sum_of_parts,
)
from softsphere.stats import Stats
from softsphere.targets import Targets

__all__ = ["LossOnShards", "ShardedStatistics"]


@dataclass(frozen=True, eq=False)
class ShardedStatistics:
    """The statistics of rows whose outputs are sums over the classes of all ranks.

    layer: the rows of W and b of this rank.
    pi: the base measure of its classes, or None for one everywhere.
    centred: whether the mean output of each row is taken off.
    statistics: takes the place of an engine, for the classes of this rank.
    kept: of layer.accumulate(), which then computes the total row once.
    """

    layer: Affine
    pi: Tensor | None
    shards: Shards
    centred: bool
    options: LinearSphericalOptions
    statistics: Statistics | None = None
    kept: Accumulation | None = None

    def of_rows(
        self, H: Tensor, target: Tensor, batch: Batch, constants: tuple[Tensor, ...] = ()
    ) -> tuple[Stats, tuple[Tensor, ...]]:
        """The statistics of the rows H (m, d) of this rank for targets (m, K) among D classes.

        constants: vectors with a number for each class of this rank. Their values at the targets,
            (m, K) each, come back beside the statistics.
        """
        K = target.shape[1]
        place, own = self.shards.sharding.local(batch.gathered(target))
        parts = self._of_own_classes(all_rows(H, batch), place, batch)
        looked_up = [_looked_up(vector, place, own).to(parts.q.dtype) for vector in constants]
        columns = parts.s.unsqueeze(1), parts.q.unsqueeze(1), torch.where(own, parts.c, 0.0)
        sums = own_sums(torch.cat([*columns, *looked_up], 1), batch)
        s, q, c, *rest = sums.split([1, 1, K, *[K] * len(constants)], 1)
        mass = float(self.shards.sharding.num_classes)
        return Stats(s.squeeze(1), q.squeeze(1), c, mass), tuple(x.detach() for x in rest)

    def _of_own_classes(self, H: Tensor, place: Tensor, batch: Batch) -> Stats:
        """s, q and c of all rows from the classes of this rank; c has a meaning for its own."""
        W = self.layer.weight
        if self.kept is None:
            x = self._by_engine(H, place)
        else:
            # kept statistics may have lost their digits, which one rank alone finds out
            with Agreement(self.shards.ranks, "the statistics of accumulate()"):
                x = self._by_engine(H, place)
        if not self.centred:
            return x
        d, mass, total = W.shape[1], mass_of(self.pi, len(W)), self._total_row()
        mean = sum_of_parts(total, batch) / self.shards.sharding.num_classes
        rest = total / mass - mean if len(W) else 0 * mean
        delta = (H.double() @ rest[:d] + rest[d:].sum()).to(x.q.dtype)
        return Stats(x.s, x.q + mass * delta * delta, x.c + delta.unsqueeze(1), x.mass)

    def _by_engine(self, H: Tensor, place: Tensor) -> Stats:
        W, b, _ = self.layer
        if not len(W):
            # zeros that depend on all inputs, so that every rank has the same graph
            nothing = H[:, :0].sum(1) + W.sum() + (0 if b is None else b.sum())
            nothing = nothing.to(sum_dtype(H, W, self.options.accumulate_dtype))
            return Stats(nothing, nothing, nothing.unsqueeze(1).expand(place.shape), 0.0)
        if self.statistics is not None:
            return self.statistics(H, place)
        return linear_statistics(
            H, W, b, place, self.pi, centred=self.centred, options=self.options
        )

    def _total_row(self) -> Tensor:
        """Σ_k π_k [W b]_k over the classes of this rank, in float64: (d), or (d + 1) with a b."""
        W, b, _ = self.layer
        compute = partial(_total_row, W, b, self.pi)
        return compute() if self.kept is None or not len(W) else self.kept.total_row(compute)


class LossOnShards(LossOverRanks):
    """See `LossOverRanks`.

    Args:
        hidden, target, target_values: of this rank.
        layer: the rows of W and b of this rank.
        kept: see `ShardedStatistics`.

    Raises ValueError or TypeError for arguments that are wrong.
    """

    loss: losses.Spherical

    def __init__(
        self,
        hidden: Tensor,
        layer: Affine,
        target: Any,
        loss: losses.Spherical,
        conventions: Conventions,
        shards: Shards,
        options: LinearSphericalOptions,
        *,
        target_values: Any = None,
        num_items: Any = None,
        kept: Accumulation | None = None,
    ) -> None:
        H, W, b = _rows(hidden, layer, kept is not None)
        dtype, D = sum_dtype(H, W, options.accumulate_dtype), shards.sharding.num_classes
        vectors = _vectors_in(conventions, dtype)
        entries = entries_of_rank(hidden, target, target_values, vectors, D, dtype)
        super().__init__(H, hidden, entries, loss, vectors, shards, num_items)
        self.weight, own = layer.weight, Affine(W, b)
        statistics = None if kept is None else kept.statistics_of_batch
        given = own, vectors.pi, shards, loss.shift_invariant, options, statistics, kept
        self.statistics = ShardedStatistics(*given)

    def weights(self) -> WeightsOfRank:
        version = version_of(self.weight) if len(self.weight) else None
        return WeightsOfRank((version,), (self.weight,), self.statistics.layer[:2])

    def of_layer(self) -> dict[str, Any]:
        parts = self.statistics
        return {
            "options": parts.options,
            "class_weights": self.conventions.weight is not None,
            "prior": parts.pi is not None,
            "accumulates": parts.kept is not None,
        }

    def losses_of_rank(self, batch: Batch, agreed: Agreement) -> tuple[Tensor, Tensor]:
        x, entries = self._statistics_of_entries(batch)
        rows = entries.weigh(spherical_value(self.loss, x, entries, self.conventions))
        return rows, entries.counted

    def _statistics_of_entries(self, batch: Batch) -> tuple[Stats, Targets]:
        """The statistics of the rows of this rank, and their targets with class weights."""
        entries, pi, w = self.entries, self.conventions.pi, self.conventions.weight
        given = tuple(vector for vector in (pi, w) if vector is not None)
        x, found = self.statistics.of_rows(self.H, entries.t, batch, given)
        if w is not None and entries.y is None:
            counted = found[-1].squeeze(1).to(entries.counted.dtype)
            entries = replace(entries, counted=counted.masked_fill(entries.ignored, 0.0))
        elif w is not None and entries.y is not None:
            entries = replace(entries, y=entries.y * found[-1])
        return replace(x, y=entries.y, pi=None if pi is None else found[0]), entries


def _total_row(W: Tensor, b: Tensor | None, pi: Tensor | None) -> Tensor:
    """Σ_k π_k [W b]_k over the classes of this rank, in float64: (d), or (d + 1) with a b."""
    parts = [W] if b is None else [W, b.unsqueeze(1)]
    if pi is None:
        return torch.cat([x.sum(0, dtype=torch.float64) for x in parts])
    return torch.cat([(pi.to(torch.float64) @ x.double()) for x in parts])


def _looked_up(vector: Tensor, place: Tensor, own: Tensor) -> Tensor:
    """The numbers of classes at their places, and 0 for those of other ranks."""
    if not len(vector):
        return vector.new_zeros(place.shape)
    return torch.where(own, vector[place], 0.0)


def _rows(hidden: Tensor, layer: Affine, accumulates: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden as rows (m, d), W and b, in the dtype of the computation."""
    W, b, names = layer
    checks.hidden(hidden, W.shape[1], names[0])
    checks.same_device(names[1], W, names[0], hidden)
    H = hidden.reshape(math.prod(hidden.shape[:-1]), W.shape[1])
    if not accumulates:
        H, W, b = autocast(H), autocast(W), None if b is None else autocast(b)
    if not accumulates or not mixed_precision(H):
        checks.same_dtype(H, W, b, names)
    return H, W, b


def _vectors_in(conventions: Conventions, dtype: torch.dtype) -> Conventions:
    w, pi = (None if v is None else v.to(dtype) for v in (conventions.weight, conventions.pi))
    return replace(conventions, weight=w, pi=pi)
