"""−log f of targets within their cluster, for rows that are grouped by clusters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softsphere import losses
from softsphere._torch import integers, transformed, values_readable
from softsphere.engines.grouped_gram import cluster_statistics, places, target_outputs_of
from softsphere.engines.grouped_products import group_outputs, group_statistics
from softsphere.engines.grouping import Group, Grouping
from softsphere.engines.leaf_choice import leaf_costs
from softsphere.engines.lines import Lines
from softsphere.engines.row_statistics import wide_dtype
from softsphere.engines.sparse_rows import sparse_rows
from softsphere.engines.stack_statistics import stack_statistics
from softsphere.engines.weight import recorded_in
from softsphere.matrix import FactoredTensor
from softsphere.matrix.stack_arrays import StackArrays
from softsphere.matrix.turns import turn
from softsphere.overflow import with_its_gradient
from softsphere.stats import Stats

__all__ = ["Leaves", "empty_entries", "leaf_losses", "log_sums", "root_scores"]

# The outputs that are in memory at once.
_PAIRS = 1 << 24
# The share of q that rounding may take from it, beyond which "auto" takes the logits.
_LOST = 1e-3


class Leaves(NamedTuple):
    """The leaves of a clustered layer.

    W: (L, d) the weight; b: (L) the bias or None; pi: (L) the base measure, whose sum over a
    cluster is its number of leaves. A factored W is diag(√π) [W b], and b is None beside it.
    """

    W: Tensor
    b: Tensor | None
    pi: Tensor

    def rows(self, index: Tensor | slice, width: int) -> tuple[Tensor, Tensor | None]:
        """W (n, width) and b (n) of some leaves."""
        if not isinstance(self.W, FactoredTensor):
            return self.W[index], None if self.b is None else self.b[index]
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self.W)), device=self.W.device)
        joined = F.embedding(index, self.W) / self.pi[index].sqrt().unsqueeze(1)
        has_bias = joined.shape[1] > width
        return joined[:, :width], joined[:, width] if has_bias else None

    def copied(self, index: Tensor, dtype: torch.dtype, *, sparse: bool) -> Leaves:
        """Some leaves in dtype, in ascending order, of a W that is not factored.

        Gradients from several places are added in these copies, before they are rounded.
        """
        W, b, pi = self
        W = sparse_rows(W, index) if sparse else W.index_select(0, index)
        b = None if b is None else b.index_select(0, index).to(dtype)
        return Leaves(W.to(dtype), b, pi.index_select(0, index))

    def recorded_in(self, dtype: torch.dtype) -> Leaves:
        """The same leaves, as `weight.recorded_in` has their W and b."""
        if isinstance(self.W, FactoredTensor):
            return self
        return Leaves(*recorded_in(self.W, self.b, dtype), self.pi)

    def distinct(self, index: Tensor) -> list[Tensor]:
        """Columns (n, ·) that are equal for leaves of one cluster with equal rows of W and b."""
        if isinstance(self.W, FactoredTensor):
            # The rows of a product may be rounded differently.
            W = self.W.matrix.arrays
            assert isinstance(W, StackArrays)
            with turn():
                W.check()
                return [W.V[index], W.old[index].unsqueeze(1)]
        columns = [self.W] if self.b is None else [self.W, self.b.unsqueeze(1)]
        return [x.detach()[index] for x in columns]


def root_scores(logits: Tensor, grouping: Grouping, rows: slice | None = None) -> Tensor:
    """The outputs of the root in float32 or wider, with −∞ for clusters without classes.

    Args:
        logits: (m, S + C), or those of some rows of the root.
        rows: which rows of the root they are of; None for all.
    """
    logits = logits.to(wide_dtype(logits.dtype))
    empty = empty_entries(grouping)
    if empty is None:
        return logits
    return logits.masked_fill(empty if rows is None else empty[rows], -torch.inf)


def empty_entries(grouping: Grouping) -> Tensor | None:
    """Whether each output of the root (S + C) is that of an empty cluster; None if none is."""
    if not grouping.has_empty:
        return None
    return F.pad(grouping.sizes == 0, (len(grouping.shortlist), 0))


def leaf_losses(
    loss: losses.Loss, Z: Tensor, leaves: Leaves, group: Group, *, engine: str, sparse: bool
) -> Tensor:
    """−log f_t of the target of each row among the leaves of its cluster: (n).

    Args:
        loss: a loss that is a distribution.
        Z: (n, d), the rows, in float32 or wider, in the order of the group.
        leaves: all leaves.
        group: the cluster and the target of each row.
        engine: "logits", "gram" or "auto", or "factored" if W is.
        sparse: whether the gradient of W is sparse; it is with the logits alone.
    """
    if engine == "factored":
        assert isinstance(loss, losses.Normalised) and isinstance(leaves.W, FactoredTensor)
        H = F.pad(Z, (0, leaves.W.shape[1] - Z.shape[1]), value=1.0)
        return with_its_gradient(loss.value(stack_statistics(H, leaves.W, group.target)))
    if engine == "auto":
        engine = _cheapest(loss, Z, leaves, group, sparse)
        careful = True
    else:
        careful = False
    if engine == "gram":
        assert isinstance(loss, losses.Normalised)
        # cast once, so that the two parts of a gradient are added before it is rounded
        W, b = leaves.W.to(Z.dtype), None if leaves.b is None else leaves.b.to(Z.dtype)
        s, q, error = cluster_statistics(Z, W, b, leaves.pi, group)
        if not (careful and values_readable(q) and bool((error > _LOST * q.detach()).any())):
            c = target_outputs_of(Z, W, b, group.target)
            return _of_statistics(loss, s, q, c, leaves.pi, group)
    parts = list(_parts(group))
    if len(parts) == 1:
        return _by_outputs(loss, Z, leaves, group, sparse)
    own, group = group.alone()
    leaves = leaves.copied(own, Z.dtype, sparse=sparse and not transformed())
    # torch.func transforms have no rule for a checkpoint, and keep the outputs of all parts
    compute = (
        _by_outputs if transformed() else partial(checkpoint, _by_outputs, use_reentrant=False)
    )
    return torch.cat([compute(loss, Z[part], leaves, group.part(part), False) for part in parts])


def _cheapest(loss: losses.Loss, Z: Tensor, leaves: Leaves, group: Group, sparse: bool) -> str:
    if sparse or not isinstance(loss, losses.Normalised):
        return "logits"
    width = leaves.W.shape[1] + int(leaves.b is not None)
    touched, U = group.touched, len(group.touched.cluster)
    cut = places(U, touched.leaves, touched.largest, len(Z), touched.most_rows)
    costs = leaf_costs(len(Z), group.pairs, U, cut, width)
    return "logits" if costs["logits"] <= costs["gram"] else "gram"


def _parts(group: Group) -> Iterator[slice]:
    """Slices of rows whose pairs fit into memory together, at least one row in each."""
    n = len(group.cluster)
    if n < 2 or n * group.grouping.largest <= _PAIRS or group.pairs <= _PAIRS:
        yield slice(0, n)
        return
    last = group.lengths.cumsum(0)
    edges = torch.arange(1, group.pairs // _PAIRS + 1, device=last.device) * _PAIRS
    cuts = integers(torch.searchsorted(last, edges).clamp_min(1).unique())
    for start, stop in itertools.pairwise([0, *(cut for cut in cuts if cut < n), n]):
        yield slice(start, stop)


def _by_outputs(loss: losses.Loss, Z: Tensor, leaves: Leaves, group: Group, sparse: bool) -> Tensor:
    """The losses from the outputs themselves."""
    W, b, pi = leaves
    lines = Lines.of(group, Z.shape[1])
    if isinstance(loss, losses.Normalised):
        s, q, c = group_statistics(Z, W, b, pi, lines, sparse=sparse)
        return _of_statistics(loss, s, q, c, pi, group)
    o = group_outputs(Z, W, b, lines, sparse=sparse)
    if isinstance(loss, losses.SoftMarginSoftmax):
        less = o.new_full((len(Z),), -loss.margin)
        o = o.view(-1).index_add(0, lines.own, less).view(o.shape)
    scores = loss.log_numerator(o) + lines.cleared(lines.spread(pi)).log()
    normaliser = scores.logsumexp(1)
    if lines.cut is not None:
        normaliser = log_sums(normaliser, lines.row, len(Z))
    return normaliser - scores.flatten().index_select(0, lines.own)


def _of_statistics(
    loss: losses.Normalised, s: Tensor, q: Tensor, c: Tensor, pi: Tensor, group: Group
) -> Tensor:
    mass = group.lengths.to(s.dtype)
    own = pi.index_select(0, group.target).unsqueeze(1)
    return with_its_gradient(loss.value(Stats(s, q, c.unsqueeze(1), mass, pi=own)))


def log_sums(scores: Tensor, segment: Tensor, count: int) -> Tensor:
    """log Σ exp of the scores of each segment, along the last dimension: (…, count).

    A segment without scores has −∞.
    """
    shape = (*scores.shape[:-1], count)
    index = segment.expand_as(scores)
    most = scores.new_full(shape, -torch.inf).scatter_reduce(-1, index, scores.detach(), "amax")
    shift = torch.where(most.isfinite(), most, 0.0)
    shares = (scores - shift.gather(-1, index)).exp()
    return shift + scores.new_zeros(shape).index_add(scores.dim() - 1, segment, shares).log()
