"""Layers whose rows are sharded over the ranks of a process group, and their state."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softsphere import checks
from softsphere._torch import is_dtensor
from softsphere.functional.loading import Loading, LoadsEntries
from softsphere.heads.computed_weights import has_computed_weights
from softsphere.heads.constructor_argument import ConstructorArgument
from softsphere.parallel import (
    Agreement,
    Ranks,
    RowsOfRanks,
    Shards,
    check_rows,
    local_rows,
    own_rows,
    whole_tensor,
)

__all__ = ["ShardedLayer", "ShardedLinear", "ShardedRows", "making"]


@contextmanager
def making(
    group: Any, num_classes: int, replicated: Any, averaged: Any
) -> Iterator[tuple[Shards | None, Agreement | None]]:
    """Yields the shards of a new layer, and an agreement on what it is; None without a group.

    An error in the context is one on every rank. Tensors that are made in it can be trained, also
    inside torch.inference_mode.
    """
    with torch.inference_mode(False), _agreement_on(group, num_classes, replicated, averaged) as it:
        yield it


@contextmanager
def _agreement_on(
    group: Any, num_classes: int, replicated: Any, averaged: Any
) -> Iterator[tuple[Shards | None, Agreement | None]]:
    """See `making`."""
    if group is None:
        if _flags(replicated, averaged):
            raise ValueError(
                "replicated and averaged have a meaning with a process_group alone; leave them out"
            )
        yield None, None
        return
    ranks = Ranks(group)
    with Agreement(ranks, "the making of a layer") as agreed:
        _flags(replicated, averaged)
        num_classes = checks.at_least_one("num_classes", num_classes)
        agreed.same(num_classes=num_classes, replicated=replicated, averaged=averaged)
        # that of the first rank tells this layer from all others that the ranks make
        agreed.each(drawn_number=secrets.randbits(62))
        shards = Shards(ranks, num_classes, replicated, averaged)
        yield shards, agreed
    shards.layer = agreed.found["drawn_number"][0]


def _flags(replicated: Any, averaged: Any) -> bool:
    """Whether one of them is given. Raises TypeError for what is no flag, ValueError for None."""
    if replicated is None:
        raise ValueError(
            "replicated must be given for a weight that is sharded over ranks: True where all "
            "ranks have the same rows, as under tensor parallelism, and False where each rank has "
            "rows of its own"
        )
    given = checks.flag("replicated", replicated)
    if averaged is not None:
        checks.flag("averaged", averaged)
    return given or averaged is not None


class ShardedRows(LoadsEntries):
    """A module that may have a process group. Then each rank has rows of its own of its tensors.

    `shards` is None without a group. The state_dict of a layer with one has DTensors with the
    placement Shard(0), under the names that the state of a whole layer has, so that
    torch.distributed.checkpoint saves and loads them on any number of ranks. `load_state_dict`
    takes such a state, and that of a whole layer, from which each rank takes its own rows.
    """

    in_features: int
    shards: Shards | None = None
    # whether the gradient of the weight has the norm of the gradient of all rows, as a factored
    # one has, and not that of the rows of this rank
    norm_is_of_all: bool = False
    # whether saving changes or needs what other ranks have, so that all must save together
    saved_together: bool = False
    # whether weight and bias are DTensors of a program that shards them by itself
    of_dtensors: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        # fully_shard would not call register_parameter of a module without a __setattr__ of its own
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: Any) -> None:
        """See `nn.Module.register_parameter`.

        Raises TypeError for a DTensor in a layer with a process group, as fully_shard makes of
        parameters that it takes for the same on all ranks.
        """
        if self.shards is not None and not self.of_dtensors and is_dtensor(param):
            raise TypeError(
                f"the {name} of a layer with a process_group is sharded already: each rank has "
                "rows of its own. Leave its parameters out of fully_shard (ignored_params="
                "set(head.parameters()), or fully_shard the layers below alone)"
            )
        super().register_parameter(name, param)

    def _rows_of(self, name: str) -> Any:
        """A parameter, or the rows of this rank of one that is a DTensor."""
        x = getattr(self, name)
        return x if self.shards is None else local_rows(name, x, self.shards.ranks)

    def _of_all(self, name: str) -> str | None:
        """The name in the state of a whole layer of a tensor with an entry for each class."""
        return name if name in ("weight", "bias") else None

    def rows_of_ranks(self, name: str) -> RowsOfRanks:
        """Which rows of a tensor each rank has."""
        assert self.shards is not None
        return self.shards.sharding

    def _row_width(self) -> int:
        """The number of columns of the weight in the state of a whole layer."""
        return self.in_features

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.shards is not None:
            together = Agreement(self.shards.ranks, "state_dict()")
            with together if self.saved_together else nullcontext():
                self._check_saving()
        self._local_state(destination, prefix, keep_vars)
        if self.shards is None:
            return
        for name in self._own_tensors():
            x = destination.pop(prefix + name)
            whole = whole_tensor(x, self.shards.ranks, self.rows_of_ranks(name))
            destination[prefix + str(self._of_all(name))] = whole

    def _load_entries(self, state_dict: dict[str, Any], prefix: str, loading: Loading) -> None:
        """Loads as every module does, after each rank has taken its own rows.

        Raises ValueError on every rank if one of them cannot.
        """
        if self.shards is not None:
            with Agreement(self.shards.ranks, "the loading of a state_dict") as agreed:
                self._refuse_computed_weights("loaded")
                self._check_state(state_dict, prefix)
                whole = self._entries_of_all(state_dict, prefix)
                agreed.same(entries=[(k, x.dtype, is_dtensor(x)) for k, x in whole.items()])
            own = {prefix + name: self._as_kept(name, x) for name, x in whole.items()}
            taken = {prefix + str(self._of_all(name)) for name in self._own_tensors()}
            state_dict = {k: v for k, v in state_dict.items() if k not in taken} | own
        self._load_local_entries(state_dict, prefix, loading)

    def _local_state(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves the tensors of this rank."""
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_local_entries(
        self, state_dict: dict[str, Any], prefix: str, loading: Loading
    ) -> None:
        """Loads the tensors of this rank."""
        super()._load_entries(state_dict, prefix, loading)

    def _own_tensors(self) -> list[str]:
        """The names of the tensors of this layer with an entry for each class of this rank."""
        named = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return [name for name, _ in named if self._of_all(name) is not None]

    def _entries_of_all(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
        """The entries of this layer in a state of the whole layer, by the names of its tensors.

        Raises ValueError for entries that this layer cannot load.
        """
        assert self.shards is not None
        found = {}
        for name in self._own_tensors():
            key = f"{prefix}{self._of_all(name)}"
            if key not in state_dict:
                continue
            x, width = state_dict[key], self._row_width()
            if not isinstance(x, Tensor):
                raise TypeError(f"{key} must be a tensor, got {type(x).__name__}")
            if name == "weight" and x.shape[1:] != (width,):
                raise ValueError(
                    f"{key} must have {width} columns, the width of the weight of the layer, got "
                    f"shape {tuple(x.shape)}"
                )
            found[name] = self._whole(key, x)
            check_rows(key, found[name], self.shards.ranks, self.rows_of_ranks(name))
        return found

    def _as_kept(self, name: str, x: Tensor) -> Tensor:
        """The rows of this rank of an entry, or a DTensor where the layer has one."""
        assert self.shards is not None
        held = self.shards.ranks, self.rows_of_ranks(name)
        rows = own_rows(name, x, *held)
        return whole_tensor(rows, *held) if is_dtensor(getattr(self, name, None)) else rows

    def _check_saving(self) -> None:
        """Raises an error if the state of a layer with a process group cannot be saved."""
        self._refuse_computed_weights("saved")

    def _refuse_computed_weights(self, done: str) -> None:
        """Raises RuntimeError where what the weight is computed from would be that of one rank."""
        if getattr(self, "parametrizations", None) or has_computed_weights(self):
            raise RuntimeError(
                f"the rows of a sharded layer with a parametrization or pruning cannot be {done} "
                "for all ranks, since what they are computed from has no names there; make it "
                "permanent first, by torch.nn.utils.parametrize.remove_parametrizations(head, "
                "'weight') or torch.nn.utils.prune.remove(head, 'weight')"
            )

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raises ValueError for a state that the layers of this one cannot load."""

    def _whole(self, key: str, x: Tensor) -> Tensor:
        """An entry for all classes, as this layer keeps it."""
        return x


class ShardedLayer(ShardedRows):
    """An output layer that may have a process group."""

    process_group = ConstructorArgument()
    replicated = ConstructorArgument()
    averaged = ConstructorArgument()

    if TYPE_CHECKING:
        # the call of every output layer, with the argument that layers with a group have besides
        def __call__(
            self,
            hidden: Tensor,
            target: Tensor,
            target_values: Tensor | None = None,
            mask: Tensor | None = None,
            num_items: float | Tensor | None = None,
        ) -> Tensor: ...


class ShardedLinear(ShardedRows, nn.Linear):
    """The rows of this rank of an `nn.Linear`.

    They have no values before `reset_parameters` is called, since ranks with other numbers of rows
    would go on with other random numbers.

    Args:
        in_features, bias, device, dtype: as in `nn.Linear`.
        shards: of its rows.
    """

    def __init__(
        self,
        in_features: int,
        shards: Shards,
        *,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, len(shards.sharding), bias, device, dtype)
        self.shards = shards

    def reset_parameters(self) -> None:
        """Draws the initial values of `nn.Linear`, if the rank has any rows."""
        if self.shards is not None and self.out_features:
            super().reset_parameters()
