"""What a clustered layer keeps besides its parameters: its grouping and the frequencies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks
from softsphere.engines.grouping import Grouping
from softsphere.engines.row_statistics import accumulator
from softsphere.heads.factored_leaves import FactoredLeaves

__all__ = ["WithGrouping"]


class WithGrouping(FactoredLeaves):
    """A module with the buffers assignment (D), prior (L) and root_shares (S + C).

    The assignment never changes. The other two stay in float32 or wider.
    """

    assignment: Tensor
    root_shares: Tensor
    root: nn.Linear
    num_classes: int
    _grouping: Grouping

    def keep_grouping(self, assignment: Tensor, counts: Tensor | None, like: Tensor) -> None:
        """Registers the buffers, on the device of a tensor, for parameters of its dtype.

        Raises TypeError or ValueError for a wrong assignment, and for wrong counts (None: ones).
        """
        self._grouping = Grouping.of(checks.assignment(assignment, self.num_classes))
        if counts is None:
            counts = torch.ones(self.num_classes)
        counts = checks.class_counts(counts)
        checks.class_vector("counts", counts, self.num_classes)
        device, dtype = like.device, accumulator(like.dtype)
        self.register_buffer("assignment", self._grouping.cluster.to(device))
        self.register_buffer("prior", self._grouping.base_measure(counts).to(device, dtype))
        self.register_buffer("root_shares", self._grouping.root_shares(counts).to(device, dtype))

    @property
    def num_clusters(self) -> int:
        """C, with empty clusters."""
        return self._grouping.num_clusters

    @property
    def grouping(self) -> Grouping:
        """Shortlist and clusters, on the device of the parameters."""
        self._grouping = self._grouping.to(self.weight.device)
        return self._grouping

    @property
    def base_measure(self) -> Tensor:
        """π of every class (D); 1 for those of the shortlist."""
        pi = self.prior.new_ones(self.num_classes)
        pi[self.grouping.leaves] = self.prior
        return pi

    def check_parameters(self) -> None:
        """Raises ValueError or TypeError for parameters that were replaced by unfit ones."""
        self.check_factored()
        S, L = len(self._grouping.shortlist), len(self._grouping.leaves)
        for name, x in (("weight", self.weight), ("bias", self.bias), ("prior", self.prior)):
            if x is not None and len(x) != L:
                raise ValueError(
                    f"{name} must have {L} rows, one for each class in a cluster, got "
                    f"{tuple(x.shape)}; make a new layer for other classes"
                )
        if len(self.root.weight) != S + self.num_clusters:
            raise ValueError(
                f"root.weight must have {S + self.num_clusters} rows, one for each class of the "
                f"shortlist and each cluster, got {tuple(self.root.weight.shape)}; make a new "
                "layer for another assignment"
            )

    @torch.no_grad()
    def copy_rows(self, rows: Tensor) -> None:
        """Copies rows in the order of the classes into the weight of the clusters.

        The rows of the shortlist are copied into `root.weight` if the root has the same width.

        Args:
            rows: (D, d'), floating-point, such as `softsphere.clusters.Clusters.rows` makes.

        Raises TypeError or ValueError for rows of a wrong kind or shape.
        """
        checks.floating("rows", rows)
        shape = (self.num_classes, self.leaf_width)
        if rows.shape != shape:
            raise ValueError(
                f"rows must have shape {shape}, one row for each class, got {tuple(rows.shape)}"
            )
        grouping, rows = self.grouping, rows.to(self.weight.device)
        self.write_leaves(rows[grouping.leaves])
        if self.root.weight.shape[1] == rows.shape[1]:
            self.root.weight[: len(grouping.shortlist)] = rows[grouping.shortlist].to(
                self.root.weight.dtype
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithGrouping:
        before = {"prior": self.prior, "root_shares": self.root_shares}
        super()._apply(fn, recurse)
        for name, wide in before.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, wide.to(moved.device))
        if not self.assignment.is_meta:
            # `to_empty` makes buffers without values.
            self.assignment.copy_(self._grouping.cluster)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads as every module does, but refuses the weights of another assignment."""
        loaded = state_dict.get(f"{prefix}assignment")
        own = self._grouping.cluster
        if loaded is not None and not torch.equal(loaded.to(own.device), own):
            error_msgs.append(
                f"{prefix}assignment is not the one that the layer was made with; make the layer "
                "with the assignment that was saved, and load again"
            )
            # The layers below load after this one: nothing changes.
            state_dict.update({prefix + key: x for key, x in self.state_dict().items()})
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
