"""What a clustered layer keeps besides its parameters: its grouping and the frequencies.

With a process group, a rank keeps the rows of its own clusters, and its rows of the root.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere._torch import exporting, values_readable, version_of
from softsphere.engines.cluster_shards import ClusterShards
from softsphere.engines.grouping import Grouping
from softsphere.engines.repeated_rows import repeated_rows
from softsphere.engines.row_statistics import wide_dtype
from softsphere.functional.loading import Loading
from softsphere.heads.clustered_checks import (
    check_can_be_written,
    check_engine,
    check_layer_above,
    check_prior,
    distribution,
)
from softsphere.heads.computed_weights import compute_weights
from softsphere.heads.factored_leaves import FactoredLeaves
from softsphere.heads.sharded import ShardedLayer, ShardedLinear
from softsphere.parallel import RowsOfRanks

__all__ = ["WithGrouping"]

_OTHER_ASSIGNMENT = (
    "assignment is not the one that the layer was made with; make the layer with the assignment "
    "that was saved, and load again"
)
_NO_ASSIGNMENT = (
    "weight has no assignment beside it, which would say that its rows are in the order of the "
    "clusters; load the assignment with it, or copy rows in the order of the classes by copy_rows()"
)


class WithGrouping(ShardedLayer, FactoredLeaves):
    """A module with the buffers assignment (D), prior (L) and root_shares (S + C).

    The assignment never changes. The other two stay in float32 or wider. With a process group, L is
    the number of leaves of this rank.
    """

    saved_together = True  # the rows of clusters are sent to other ranks

    assignment: Tensor
    root_shares: Tensor
    root: nn.Linear
    project: nn.Linear | None
    loss: losses.Loss
    num_classes: int
    sparse: bool
    _clusters: ClusterShards
    _unmoved: tuple[Tensor, Tensor] | None
    _checked_prior: tuple[Tensor | None, int, int]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "assignment" and "assignment" in self._buffers:
            value = self._same_assignment(value)
        super().__setattr__(name, value)

    def _same_assignment(self, given: Any) -> Tensor:
        """The assignment of the layer as it is given. Raises AttributeError for another one."""
        own = self._grouping.cluster
        if (
            isinstance(given, Tensor)
            and not isinstance(given, nn.Parameter)
            and not (given.is_meta or given.is_floating_point())
            and torch.equal(given.to(own.device, own.dtype), own)
        ):
            return given.long()
        raise AttributeError(
            "assignment of a ClusteredLoss cannot be changed; make a new layer with it"
        )

    def _keep_grouping(self, assignment: Tensor, counts: Tensor | None, like: Tensor) -> None:
        """Registers the buffers, on the device of a tensor, for parameters of its dtype.

        Raises TypeError or ValueError for a wrong assignment, and for wrong counts (None: ones).
        """
        size, rank = (
            (1, 0) if self.shards is None else (self.shards.ranks.size, self.shards.ranks.rank)
        )
        with torch.device("cpu"):  # whatever the default device is
            grouping = Grouping.of(checks.assignment(assignment, self.num_classes))
            counts = torch.ones(self.num_classes) if counts is None else counts
            counts = checks.class_counts(counts)
            checks.class_vector("counts", counts, self.num_classes)
            shares, pi = grouping.root_shares(counts), grouping.base_measure(counts)
            self._clusters = ClusterShards.of(grouping, shares, size, rank)
        device, dtype = like.device, wide_dtype(like.dtype)
        narrow = pi.to(dtype)
        if not bool((narrow > 0).all()):
            raise ValueError(
                f"counts span more than {dtype} holds within a cluster: the smallest share of one "
                f"is {float(pi.min()):g} of the mean; give rare classes larger counts"
            )
        narrow = narrow if self.shards is None else narrow[self._clusters.leaves()].clone()
        self.register_buffer("assignment", grouping.cluster.to(device))
        self.register_buffer("prior", narrow.to(device))
        self.register_buffer("root_shares", shares.to(device, dtype))
        # On the meta device buffers have no values, and get them when they are moved from there.
        self._unmoved = (narrow, shares.to(dtype)) if device.type == "meta" else None
        self._checked_prior = (None, 0, 0)

    @property
    def num_clusters(self) -> int:
        """C, with empty clusters."""
        return self._grouping.num_clusters

    @property
    def _grouping(self) -> Grouping:
        return self._clusters.grouping

    @property
    def clusters(self) -> ClusterShards:
        """The classes of the ranks, on the device of the parameters."""
        self._clusters = self._clusters.to(self.weight.device)
        return self._clusters

    @property
    def grouping(self) -> Grouping:
        """Shortlist and clusters of all ranks, on the device of the parameters.

        Raises RuntimeError on the meta device, where it is not known which clusters are needed.
        """
        self._check_values()
        return self.clusters.grouping

    @property
    def base_measure(self) -> Tensor:
        """π of every class (D); 1 for those of the shortlist.

        With a process group it is `prior`, π of the leaves of this rank.
        """
        if self.shards is not None:
            return self.prior
        pi = self.prior.new_ones(self.num_classes)
        pi[self.grouping.leaves] = self.prior
        return pi

    def versions(self) -> tuple[Any, ...]:
        """Name the values of root and leaves; None where this rank cannot tell of a step.

        It cannot without rows, or where an optimizer of sparse gradients may leave all as they are.
        """
        leaves: Any = None
        if len(self.weight) and self.weight.requires_grad and not self.sparse:
            factored = self.engine == "factored"
            leaves = self._stack().edition if factored else version_of(self.weight)
        root = self.root.weight
        return version_of(root) if len(root) and root.requires_grad else None, leaves

    def _check_values(self) -> None:
        """Raises RuntimeError on the meta device."""
        if self.assignment.is_meta:
            raise RuntimeError(
                "a ClusteredLoss has no values on the meta device; call to_empty(device=...) and "
                "reset_parameters(), or load_state_dict(..., assign=True), and then use it"
            )

    def _check_parameters(self) -> None:
        """Raises ValueError or TypeError for parameters that were replaced by unfit ones."""
        check_engine(distribution(self.loss), self.engine, self.sparse)
        self._check_factored()
        self._check_values()
        L = self._clusters.number_of_leaves
        for name, x in (("weight", self.weight), ("bias", self.bias)):
            if x is not None and len(x) != L:
                raise ValueError(
                    f"{name} must have {L} rows, one for each class in a cluster, got "
                    f"{tuple(x.shape)}; make a new layer for other classes"
                )
        width = self.leaf_width + (self.engine == "factored" and self.has_bias)
        if self.weight.shape[1:] != (width,):
            raise ValueError(
                f"weight must have shape ({L}, {width}), got "
                f"{tuple(self.weight.shape)}; make a new layer for another width"
            )
        entry, R = "class of the shortlist and each cluster", len(self._clusters.root)
        check_layer_above("root", self.root, self.in_features, R, entry)
        if self.project is not None:
            given = self.in_features, self.leaf_width, "feature of the leaves"
            check_layer_above("project", self.project, *given)
        self._check_prior()

    def _check_prior(self) -> None:
        """Checks the base measure where it is not the one that was checked last: that is O(D)."""
        pi, (_, known, version) = self.prior, self._checked_prior
        # of a copy of the layer, the tensor is a copy too and has another id
        if known != id(pi) or version != version_of(pi):
            check_prior(pi, self.clusters.own)
            self._check_measure_of_factors()
            if values_readable(pi):
                self._checked_prior = (pi, id(pi), version_of(pi))

    @torch.no_grad()
    def copy_rows(self, rows: Tensor) -> None:
        """Copies rows in the order of the classes into the weight of the clusters.

        The rows of the shortlist are copied into `root.weight` if the root has the same width.

        Args:
            rows: (D, d'), floating-point, such as `softsphere.clusters.Clusters.rows` makes.

        Raises TypeError or ValueError for rows of a wrong kind or shape, and TypeError for a weight
        that is computed from other parameters.
        """
        checks.floating("rows", rows)
        shape = (self.num_classes, self.leaf_width)
        if rows.shape != shape:
            raise ValueError(
                f"rows must have shape {shape}, one row for each class, got {tuple(rows.shape)}"
            )
        clusters, grouping = self.clusters, self.grouping
        of_root = self.root.weight.shape[1] == rows.shape[1]
        check_can_be_written(self, "weight")
        if of_root:
            check_can_be_written(self.root, "root.weight")
        rows = rows.to(self.weight.device)
        self._write_leaves(rows[grouping.leaves[clusters.leaves()]])
        if of_root:
            listed = rows[grouping.shortlist[clusters.listed]]
            self.root.weight[: len(listed)] = listed.to(self.root.weight.dtype)

    def rows(self, classes: Tensor) -> Tensor:
        """Returns the rows of the weight of given classes, as `nn.Embedding` does: (…, d).

        Autograd goes through them, so that they can serve as input embeddings that are tied to the
        output layer. With `sparse=True` the gradient of `weight` is sparse here too.

        Args:
            classes: (…), class indices of any integer dtype.

        Raises ValueError or TypeError for wrong indices, and ValueError for a layer whose classes
        do not all have a row of width d here: one with leaf_features, factored, or sharded.
        """
        compute_weights(self)
        compute_weights(self.root)
        if self.leaf_width != self.root.weight.shape[1]:
            raise ValueError(
                "rows of the weight have two widths in a layer with leaf_features "
                f"({self.root.weight.shape[1]} in the shortlist, {self.leaf_width} in clusters); "
                "make the layer without leaf_features to tie its rows"
            )
        if self.engine == "factored" or self.shards is not None:
            kind = "a factored weight" if self.shards is None else "a layer with a process_group"
            raise ValueError(
                f"the rows of {kind} cannot be tied to input embeddings; make the layer with "
                "another engine and without a process_group"
            )
        checks.same_device("classes", classes, "weight", self.weight)
        wanted = checks.classes(classes, self.num_classes)
        each, grouping = wanted.reshape(-1), self.grouping
        place, listed = grouping.place[each], grouping.cluster[each] < 0
        if exporting():  # a program for any classes, which reads a row of each table for every one
            found = F.embedding(torch.where(listed, place, 0), self.root.weight)
            if len(self.weight):
                of_leaves = F.embedding(torch.where(listed, 0, place), self.weight)
                found = torch.where(listed.unsqueeze(1), found, of_leaves)
            return found.view(*wanted.shape, self.leaf_width)
        # Each table is asked for its own rows alone: a sparse gradient has no others.
        of_root, of_leaves = listed.nonzero().squeeze(1), (~listed).nonzero().squeeze(1)
        wide = wide_dtype(self.weight.dtype)
        found = torch.cat(
            [
                repeated_rows(self.root.weight, place[of_root], wide),
                repeated_rows(self.weight, place[of_leaves], wide, sparse=self.sparse),
            ]
        )
        order = torch.cat([of_root, of_leaves]).argsort()
        found = found.index_select(0, order).to(self.weight.dtype)
        return found.view(*wanted.shape, self.leaf_width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithGrouping:
        before = {"prior": self.prior, "root_shares": self.root_shares}
        super()._apply(fn, recurse)
        self._checked_prior = (None, 0, 0)
        if self._unmoved is not None and not self.prior.is_meta:
            for buffer, values in zip((self.prior, self.root_shares), self._unmoved, strict=True):
                buffer.copy_(values)
            self._unmoved = None
        for name, wide in before.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, wide.to(moved.device))
        if not self.assignment.is_meta:
            # `to_empty` makes buffers without values.
            self.assignment.copy_(self._grouping.cluster)
        return self

    def rows_of_ranks(self, name: str) -> RowsOfRanks:
        return self._clusters.leaf_owners()

    def _of_all(self, name: str) -> str | None:
        return name if name in ("weight", "bias", "prior") else None

    def _own_tensors(self) -> list[str]:
        return ["weight", *(["bias"] if self.has_bias else []), "prior"]

    def _row_width(self) -> int:
        return self.leaf_width

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        refusal = self._refusal(state_dict, prefix)
        if refusal is not None:
            raise ValueError(prefix + refusal)
        if isinstance(self.root, ShardedLinear):
            self.root._entries_of_all(state_dict, f"{prefix}root.")
        on_every_rank: dict[str, Tensor] = {"root_shares": self.root_shares}
        if self.project is not None:
            on_every_rank.update(self.project.named_parameters(prefix="project"))
        for name, own in on_every_rank.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.shape != own.shape:
                raise ValueError(
                    f"{prefix}{name} must have shape {tuple(own.shape)}, got {tuple(given.shape)}"
                )

    def _refusal(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why the rows of a state are not in the order of this layer; None if they may be.

        A part of a state of such a layer may have no assignment, as the parameters alone have none.
        """
        loaded, own = state_dict.get(f"{prefix}assignment"), self._grouping
        if loaded is not None:
            same = torch.equal(loaded.to(own.cluster.device), own.cluster)
            return None if same else _OTHER_ASSIGNMENT
        has_root = any(key.startswith(f"{prefix}root.") for key in state_dict)
        if has_root or f"{prefix}weight" not in state_dict:
            return None
        in_order = torch.arange(self.num_classes, device=own.leaves.device)
        return None if torch.equal(own.leaves, in_order) else _NO_ASSIGNMENT

    def _load_entries(self, state_dict: dict[str, Any], prefix: str, loading: Loading) -> None:
        """Loads as every module does, but refuses the weights of another assignment."""
        refusal = self._refusal(state_dict, prefix) if self.shards is None else None
        if refusal is not None:
            loading.error_msgs.append(prefix + refusal)
            # The layers below load after this one: nothing changes.
            state_dict.update({prefix + key: x for key, x in self.state_dict().items()})
            return
        if self.shards is None:
            self._widen_entries(state_dict, prefix)
        super()._load_entries(state_dict, prefix, loading)
        if not self.prior.is_meta:  # as it stays where a state is copied and not assigned
            self._unmoved = None

    def _widen_entries(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Makes entries what the buffers are: wide, and a base measure that was rounded one again.

        A state may have been cast to half precision, and with assign=True become the buffers.
        """
        dtype = wide_dtype(self.weight.dtype)
        for name, L in (("prior", len(self.prior)), ("root_shares", len(self.root_shares))):
            x = state_dict.get(prefix + name)
            if not isinstance(x, Tensor) or x.is_meta or x.shape != (L,):
                continue
            wide = x.to(dtype) if x.dtype.itemsize < dtype.itemsize else x
            if name == "prior" and wide is not x and bool((wide > 0).all()):
                wide = self._grouping.to(wide.device).normalised(wide)
            state_dict[prefix + name] = wide
        x = state_dict.get(f"{prefix}assignment")
        if isinstance(x, Tensor):
            state_dict[f"{prefix}assignment"] = x.long()
