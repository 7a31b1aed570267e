"""The output layer that first finds a cluster of classes, and then the class within it.

The file is long for its docstrings, and for its loss with and without a process group.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere._torch import eager, exporting, graph_is_captured
from softsphere.engines.row_statistics import wide_dtype
from softsphere.functional.conventions import Conventions, mixed_precision
from softsphere.functional.on_cluster_shards import ClustersOfRank, LossOnClusterShards
from softsphere.functional.on_leaves import Leaves, empty_entries, leaf_losses
from softsphere.functional.root_losses import has_root_losses, root_losses
from softsphere.heads.affine import made_dtype
from softsphere.heads.clustered_checks import (
    check_can_be_written,
    check_engine,
    distribution,
    refuse_mapped_targets,
    refuse_other_targets,
)
from softsphere.heads.clustered_reader import ClusteredReader, Root, root_log_prob
from softsphere.heads.clustered_state import WithGrouping
from softsphere.heads.constructor_argument import LINEAR_HAS_IT, ConstructorArgument
from softsphere.heads.factored_leaves import factored_leaves, of_the_same_leaves
from softsphere.heads.prediction import OutputLayer
from softsphere.heads.reader import Reader
from softsphere.heads.sharded import ShardedLinear, making
from softsphere.heads.sharded_clusters import ReaderOfClusters, ShardedClusteredReader
from softsphere.matrix.interrupts import undisturbed
from softsphere.parallel import Agreement, Shards, checksum
from softsphere.targets import Targets

__all__ = ["ClusteredLoss"]

_NAMES = ("hidden", "weight", "bias")
EAGER = (
    "what the loss of a clustered layer computes depends on the clusters of the targets, so that "
    "neither an exported program nor a compiled graph can hold it; compile the model around it"
)
EAGER_PREDICTION = (
    "a prediction of a clustered layer is no part of a compiled graph; compile the model around "
    "it, and export it by torch.export.export with strict=False"
)
FACTORED_EXPORT = (
    "leaves that are kept in factors cannot be part of an exported program; load the state_dict() "
    "of the layer into one with engine='auto', and export that"
)
# The bias of an empty cluster, which is never read.
_NO_SHARE = -100.0


class ClusteredLoss(WithGrouping, OutputLayer):
    r"""A two-level output layer and its loss in one module: exact, at the cost of few outputs.

    Every class is in a shortlist or in one of C clusters. The root is a softmax over the S classes
    of the shortlist and the clusters. A cluster, called a leaf, is a distribution of its own:

        p_k = softmax(W_r h + b_r)_k                                  for k in the shortlist,
        p_k = softmax(W_r h + b_r)_c · π_k t(o_k) / Σ_j∈c π_j t(o_j)   for k in the cluster c,

    with o_k = w_k · z + b_k and z = h, or z = P h with `leaf_features`. The loss is −log p_t. A row
    costs its root and, if its target is in a cluster, the classes of that cluster. With clusters of
    classes that occur in the same surroundings, as `softsphere.clusters` makes them, the model has
    about the quality of softmax over all classes.

    The parameters are `root.weight` (S + C, d) and `root.bias`, `weight` (L, d') and `bias` (L) of
    the L = D − S classes in clusters, cluster by cluster, and `project.weight` (d', d) with
    `leaf_features`. Any optimizer can step them, unless the engine is "factored".

    Args:
        in_features: d.
        num_classes: D.
        assignment: (D), the cluster 0, …, C − 1 of each class, or −1 for the shortlist, as any
            integer dtype, in whatever order the classes are. A number without classes is an empty
            cluster, which has probability 0. The buffer `assignment` holds it and never changes.
        leaf: the loss of a leaf, a name or a loss: one that is a distribution.
        leaf_features: d', the width of a projection of hidden for the leaves; None for none.
        counts: (D), positive class frequencies or counts. Within each cluster they are the base
            measure π, kept as the buffer `prior` (L) with a sum of one a class. The initial bias of
            the root is the logarithm of their shares, so that the model begins with the frequencies
            where hidden states are near 0. A class with a count of 0 is given the count of the
            rarest one. None stands for equal counts.
        bias: whether root and leaves have a bias.
        engine: "logits" computes the outputs of each row's cluster, "gram" one Gram matrix for each
            cluster, and "auto" takes the cheaper one; see `softsphere.engines.choose_leaves`.
            "factored" keeps the weight of each cluster in factors: a row costs O(d'²), however many
            classes its cluster has. It takes spherical leaves, float32 or float64, and SGD without
            momentum. The parameter `weight` is then diag(√π) [W b] (L, d' + 1), a
            `softsphere.matrix.FactoredTensor`, and `bias` is None; state_dict() holds W and b.
        reduction, ignore_index: as in `nn.CrossEntropyLoss`.
        label_smoothing: must be 0.
        sparse: whether the gradient of `weight` is a sparse tensor of the classes whose clusters
            have rows in the batch, as in `nn.Embedding`. `torch.optim.SGD` without momentum,
            `torch.optim.Adagrad` and `torch.optim.SparseAdam` take it. A step then touches no other
            rows. The gradients of `bias` and of root and projection are dense, and SparseAdam takes
            no dense one. DistributedDataParallel takes sparse gradients of `nn.Embedding` alone.
        device, dtype: of the parameters.
        process_group, replicated, averaged: as in `LinearSphericalLoss`. Each cluster belongs to
            one rank as a whole. The ranks have about equal shares of the counts of the classes in
            clusters. `weight` and `bias` have the leaves of this rank, `root.weight` and
            `root.bias` ⌈(S + C)/n⌉ rows. `project.weight` is the same on all ranks, and its
            gradient is that of the rows of all ranks: it must not be reduced.

    With a process_group a step sends O(m d + d d') numbers for the m rows of all ranks, whatever
    the numbers of classes and clusters are; all else is as in `LinearSphericalLoss`. `state_dict()`
    sends the rows of clusters to the ranks that have them in a DTensor, so that all ranks must call
    it.

    Shapes: hidden (…, d); target (…), class indices of any integer dtype.

    Raises ValueError or TypeError for invalid arguments. The message names the argument, the value
    received and a valid alternative.

    Source: Goodman 2001, arXiv:cs/0108006 (classes of words); Chen, Grangier & Auli 2015,
    arXiv:1512.04906 (what makes clusters good); de Brébisson & Vincent 2015, arXiv:1511.05042 (the
    losses of the leaves).

    >>> assignment = torch.arange(1000) // 10 - 1  # a shortlist of ten classes, and 99 clusters
    >>> head = ClusteredLoss(8, 1000, assignment)
    >>> head(torch.randn(4, 8), torch.tensor([1, 5, 5, 999])).backward()
    >>> torch.allclose(head.log_prob(torch.randn(4, 8)).exp().sum(1), torch.ones(4))
    True
    """

    root: nn.Linear
    project: nn.Linear | None
    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int = ConstructorArgument(kept=True)  # type: ignore[assignment]
    num_classes: int = ConstructorArgument(kept=True)  # type: ignore[assignment]
    leaf = ConstructorArgument(read="loss", instead="assign the loss of the leaves to `loss`")
    leaf_features = ConstructorArgument()
    counts = ConstructorArgument()
    class_weight = ConstructorArgument(instead=LINEAR_HAS_IT)
    label_smoothing = ConstructorArgument(
        instead="it needs the outputs of all classes, so use LinearSphericalLoss"
    )

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        assignment: Tensor,
        *,
        leaf: str | losses.Loss = "taylor_softmax",
        leaf_features: int | None = None,
        counts: Tensor | None = None,
        bias: bool = True,
        engine: str = "auto",
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
        replicated: bool = False,
        averaged: bool | None = None,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {"leaf": leaf, "leaf_features": leaf_features, "counts": counts}
        given |= {"bias": bias, "engine": engine, "sparse": sparse, "device": device}
        given |= {"reduction": reduction, "ignore_index": ignore_index, "dtype": dtype}
        given |= {"label_smoothing": label_smoothing}
        with making(process_group, num_classes, replicated, averaged) as (shards, agreed):
            self.shards = shards
            self._make(in_features, num_classes, assignment, **given)
            if agreed is not None:
                agreed.same(layer=self.extra_repr(), dtype=self.weight.dtype, sparse=self.sparse)
                agreed.same(leaf_features=leaf_features, counts=checksum(counts))
                agreed.same(
                    assignment=checksum(self._grouping.cluster),
                    owners_of_clusters=checksum(self._clusters.owners.owner),
                )
        self.reset_parameters()

    def _make(
        self,
        in_features: int,
        num_classes: int,
        assignment: Tensor,
        *,
        leaf: str | losses.Loss,
        leaf_features: int | None,
        counts: Tensor | None,
        bias: bool,
        engine: str,
        sparse: bool,
        label_smoothing: float,
        device: Any,
        dtype: torch.dtype | None,
        **rest: Any,
    ) -> None:
        """Checks the arguments of the constructor, and makes attributes, parameters and buffers."""
        self.in_features = checks.at_least_one("in_features", in_features)
        self.num_classes = checks.at_least_one("num_classes", num_classes)
        self.has_bias = checks.flag("bias", bias)
        made_dtype(dtype)
        self.loss = leaf  # type: ignore[assignment]
        width = self.in_features
        if leaf_features is not None:
            width = checks.at_least_one("leaf_features", leaf_features)
        self.engine, self.sparse = engine, checks.flag("sparse", sparse)
        check_engine(self.loss, engine, sparse)
        self.leaf_width = width
        if checks.label_smoothing(label_smoothing):
            raise ValueError(
                "label_smoothing cannot be used with a ClusteredLoss, since it needs the outputs "
                f"of all classes, got {label_smoothing}; leave it 0, or use LinearSphericalLoss"
            )
        conventions = Conventions.checked(self.loss, **rest)
        self.reduction = conventions.reduction
        self.ignore_index = conventions.ignore_index
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self._keep_grouping(assignment, counts, torch.empty(0, **made))
        L, rows = self._clusters.number_of_leaves, self._clusters.root.total
        self.root = (
            nn.Linear(self.in_features, rows, bias=bias, **made)
            if self.shards is None
            else ShardedLinear(self.in_features, self.shards.of_rows(rows), bias=bias, **made)
        )
        self.project = (
            None
            if leaf_features is None
            else nn.Linear(self.in_features, width, bias=False, **made)
        )
        W, b = torch.empty(L, width, **made), torch.empty(L, **made) if bias else None
        if engine == "factored":
            W, b = factored_leaves(W, b, self._clusters.starts, self.prior), None
        self.weight = nn.Parameter(W)
        self.register_parameter("bias", None if b is None else nn.Parameter(b))

    def _usable_loss(self, loss: Any) -> losses.Loss:
        """Raises TypeError for a loss that is no distribution, or not one for the engine."""
        given = distribution(loss)
        if "engine" in self.__dict__:  # not while the layer is made
            check_engine(given, self.engine, self.sparse)
        return given

    def reset_parameters(self) -> None:
        """Draws the initial values of `nn.Linear` for the weights.

        The bias of the root is the logarithm of the shares of the counts, that of the leaves is 0.
        With a process_group, whose ranks must all call this, each rank draws other numbers, except
        for the projection, which is that of rank 0.
        """
        check_can_be_written(self, "weight")
        bound, shards = 1 / math.sqrt(self.leaf_width), self.shards
        own = nullcontext() if shards is None else shards.own_numbers(self.weight.device)
        with torch.no_grad(), own:
            for layer in (self.root, self.project):
                if layer is not None:
                    layer.reset_parameters()
            if shards is not None and self.project is not None and not self.weight.is_meta:
                self.project.weight.copy_(shards.ranks.gather(self.project.weight)[0])
            if self.has_bias:
                shares = self.root_shares[self._clusters.root.slice]
                self.root.bias.copy_(shares.log().clamp_min(_NO_SHARE))
            with undisturbed():
                for block, reach in zip(self._leaf_blocks(), (bound, 0.0), strict=False):
                    block.uniform_(-reach, reach)
                self._leaves_written()

    @eager(EAGER)
    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        target_values: None = None,
        mask: None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Computes −log p of the targets, reduced over the rows.

        In evaluation mode too this is the exact negative log-probability of the targets, and costs
        what a training row costs; with reduction="none" it is that of each row.

        Args:
            hidden: (…, d), floating-point.
            target: (…), class indices of any integer dtype.
            target_values, mask: must be None.
            num_items: with a process_group, what the mean divides by: the same number on all
                ranks. None stands for the number of rows of all ranks that are not ignored.

        Returns a scalar, or (…) for reduction "none".

        Raises ValueError or TypeError for invalid arguments, and RuntimeError inside the capture of
        a CUDA graph.
        """
        if graph_is_captured():  # before anything waits, which would leave the capture in disorder
            raise RuntimeError(
                "a ClusteredLoss cannot be captured in a CUDA graph, since the shapes of its step "
                "depend on the clusters that the batch meets; step it without CapturedStep"
            )
        if self.shards is not None:
            return self._loss_on_shards(self.shards, hidden, target, target_values, mask, num_items)
        checks.only_with_a_group("num_items", num_items)
        entries, conventions = self._checked(hidden, target, target_values, mask)
        H = hidden.reshape(-1, self.in_features)
        rows = self._losses(H, entries.t.squeeze(1), entries.ignored)
        rows = rows.masked_fill(entries.ignored, 0.0)  # there are no class weights
        return conventions.finish(rows.view(hidden.shape[:-1]), entries.counted, hidden)

    def _checked(
        self, hidden: Tensor, target: Tensor, target_values: Any, mask: Any
    ) -> tuple[Targets, Conventions]:
        """The targets of the rows and their conventions, after checks of all that is given."""
        refuse_other_targets(target_values, mask)
        self._check_parameters()
        checks.hidden(hidden, self.in_features)
        checks.same_device("weight", self.weight, "hidden", hidden)
        checks.same_device("target", target, "hidden", hidden)
        checks.rows_target(hidden.shape[:-1], target)
        refuse_mapped_targets(target)
        if not mixed_precision(hidden):
            checks.same_dtype(hidden, self.weight, self.bias, _NAMES)
            for name, layer in (("root", self.root), ("project", self.project)):
                if layer is not None:
                    names = "hidden", f"{name}.weight", f"{name}.bias"
                    checks.same_dtype(hidden, layer.weight, layer.bias, names)
        dtype = wide_dtype(self.weight.dtype)
        conventions = self.conventions
        entries = conventions.entries(target.reshape(-1), None, self.num_classes, dtype)
        return entries, conventions

    def _losses(self, H: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
        """−log p of the target of each row H (m, d): (m), in float32 or wider."""
        grouping = self.grouping
        dtype = wide_dtype(self.weight.dtype)
        cluster = grouping.cluster.index_select(0, target)
        place = grouping.place.index_select(0, target)
        nll = self._root_losses(H, grouping.root_entry(cluster, place)).to(dtype)
        rows, group = grouping.group(cluster.masked_fill_(ignored, -1), place)
        Z = H.index_select(0, rows)
        Z = Z if self.project is None else self.project(Z)
        with torch.autocast(H.device.type, enabled=False):
            of_leaves = leaf_losses(
                self.loss if self.training else self.loss.plain,
                Z.to(dtype),
                Leaves(self.weight, self.bias, self.prior.to(dtype)),
                group,
                engine=self.engine,
                sparse=self.sparse,
            )
        return nll.index_add(0, rows, of_leaves.to(nll.dtype))

    def _root_losses(self, H: Tensor, entry: Tensor) -> Tensor:
        """−log p of one entry of the root for each row: (m)."""
        root, grouping = self.root, self.grouping
        if has_root_losses(root, H):
            return root_losses(H, root.weight, root.bias, entry, empty_entries(grouping))
        log_p = root_log_prob(root(H), grouping)
        return -log_p.gather(1, entry.unsqueeze(1)).squeeze(1)

    def _loss_on_shards(
        self,
        shards: Shards,
        hidden: Tensor,
        target: Tensor,
        values: Any,
        mask: Any,
        num_items: Any,
    ) -> Tensor:
        """`forward` with a process group."""
        with Agreement(shards.ranks, "a loss") as agreed:
            shards.check_below(self, hidden, target)
            entries, conventions = self._checked(hidden, target, values, mask)
            loss = self.loss if self.training else self.loss.plain
            given = hidden, entries, self._part_of_rank(), loss, conventions
            job = LossOnClusterShards(*given, shards, num_items)
            job.agree(agreed)
        return job.value(agreed)

    def _part_of_rank(self) -> ClustersOfRank:
        """The weights and the clusters of this rank."""
        dtype = wide_dtype(self.weight.dtype)
        return ClustersOfRank(
            self.root.weight,
            self.root.bias,
            None if self.project is None else self.project.weight,
            Leaves(self.weight, self.bias, self.prior.to(dtype)),
            self.clusters,
            self.versions(),
            self.engine,
            self.sparse,
        )

    def _reader(self) -> Reader:
        if exporting() and self.engine == "factored":
            raise RuntimeError(FACTORED_EXPORT)
        self._check_parameters()
        pi = self.prior.to(wide_dtype(self.weight.dtype))
        leaves = Leaves(self.weight, self.bias, pi)
        root = Root(self.root, self.project)
        if self.shards is not None:
            given = self.loss.plain, root, leaves, self.clusters, self.versions()
            return ShardedClusteredReader(ReaderOfClusters(*given), self.shards)
        return ClusteredReader(self.loss.plain, root, leaves, self.grouping, self.num_classes)

    log_prob = eager(EAGER_PREDICTION)(of_the_same_leaves(OutputLayer.log_prob))
    topk = eager(EAGER_PREDICTION)(of_the_same_leaves(OutputLayer.topk))
    predict = eager(EAGER_PREDICTION)(of_the_same_leaves(OutputLayer.predict))
    rank = eager(EAGER_PREDICTION)(of_the_same_leaves(OutputLayer.rank))

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.num_classes}, shortlist={len(self._grouping.shortlist)}, "
            f"clusters={self.num_clusters}, leaf={self.loss}, bias={self.has_bias}, "
            f"engine={self.engine!r}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}"
        )
