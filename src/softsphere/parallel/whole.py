"""Tensors with rows of all ranks as `DTensor`s, and the part of one rank.

A `DTensor` with the placement Shard(0) has the same number of rows on every rank, except the last
ones. Rows with other owners are sent to the ranks that have them there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere._torch import is_dtensor
from softsphere.parallel.ranks import Ranks
from softsphere.parallel.sharding import Owners, RowsOfRanks, Sharding

__all__ = ["check_rows", "local_rows", "mesh_of_rows", "own_rows", "whole_tensor"]


def mesh_of_rows(name: str, x: Tensor) -> Any:
    """The mesh over which the rows of a DTensor are sharded, or None for an ordinary tensor.

    Raises ValueError for a DTensor that is not sharded by Shard(0) over one dimension.
    """
    if not is_dtensor(x):
        return None
    from torch.distributed.tensor import Shard

    found: Any = x
    if tuple(found.placements) != (Shard(0),):
        raise ValueError(
            f"{name} must be sharded by its rows, Shard(0) over a mesh of one dimension, got a "
            f"DTensor with the placements {found.placements} over {found.device_mesh}; "
            "redistribute it, or make the output layer from its full_tensor()"
        )
    return found.device_mesh


def local_rows(name: str, x: Tensor, ranks: Ranks) -> Tensor:
    """The rows of this rank of a weight, whose gradient is that of the weight.

    Raises ValueError for a DTensor over other ranks than those of the layer.
    """
    mesh = mesh_of_rows(name, x)
    if mesh is None:
        return x
    if not _is_over(mesh, ranks):
        raise ValueError(
            f"{name} must be sharded over the ranks {ranks.of_world} of the layer in the order of "
            f"their process group, got {mesh}"
        )
    given: Any = x
    own: Tensor = given.to_local()
    return own


def _is_over(mesh: Any, ranks: Ranks) -> bool:
    """Whether a mesh of one dimension is over these ranks in their order, and says that of this."""
    given = mesh.mesh.flatten().tolist()
    return given == ranks.of_world and list(mesh.get_coordinate()) == [ranks.rank]


def whole_tensor(x: Tensor, ranks: Ranks, rows: RowsOfRanks) -> Tensor:
    """A tensor of the rows of all ranks, from the rows x of this one.

    It shares the memory of x if the rows are a `Sharding`. Otherwise it is a copy, and all ranks
    must call this.
    """
    if is_dtensor(x):
        return x
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(ranks.group, x.device.type)
    shape = torch.Size([rows.total, *x.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    local = _to_even(x.detach(), ranks, rows)
    whole: Tensor = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    return whole


def check_rows(key: str, x: Any, ranks: Ranks, rows: RowsOfRanks) -> None:
    """Checks an entry with the rows of all ranks.

    Raises ValueError for another number of rows, and for a DTensor that is sharded otherwise.
    """
    from torch.distributed.tensor import DTensor, Shard

    if x.shape[:1] != (rows.total,):
        raise ValueError(
            f"{key} must have {rows.total} rows, those of all ranks together, got shape "
            f"{tuple(x.shape)}; the rows of one rank alone cannot be loaded, since they do not say "
            "whose they are"
        )
    if not isinstance(x, DTensor):
        return
    local: Tensor = x.to_local()
    if tuple(x.placements) != (Shard(0),) or len(local) != len(_even(rows)):
        raise ValueError(
            f"{key} must be sharded by Shard(0) over the {ranks.size} ranks of the layer, "
            f"got {x.placements} with {len(local)} rows on this rank; load it by "
            "torch.distributed.checkpoint into the state_dict() of this layer"
        )
    if not _is_over(x.device_mesh, ranks):
        raise ValueError(
            f"{key} must have the rows of this rank, the one with number {ranks.rank} of the ranks "
            f"{ranks.of_world} of the layer, got those of {x.device_mesh.get_coordinate()} in "
            f"{x.device_mesh}, as in a file that torch.save wrote on one rank; save by "
            "torch.distributed.checkpoint, or full_tensor() of each entry"
        )


def own_rows(key: str, x: Any, ranks: Ranks, rows: RowsOfRanks) -> Tensor:
    """The rows of this rank of an entry for all ranks; see `check_rows`.

    All ranks must call this for a DTensor whose rows are no `Sharding`.
    """
    check_rows(key, x, ranks, rows)
    if is_dtensor(x):
        return _from_even(x.to_local(), ranks, rows)
    own: Tensor = x[rows.own]
    # a view would keep the rows of all ranks in memory
    return own.clone() if isinstance(rows, Sharding) else own


def _even(rows: RowsOfRanks) -> Sharding:
    """The rows as Shard(0) has them."""
    return rows if isinstance(rows, Sharding) else Sharding(rows.total, rows.size, rows.rank)


def _to_even(x: Tensor, ranks: Ranks, rows: RowsOfRanks) -> Tensor:
    """The rows that Shard(0) has on this rank, from its own rows x of another kind."""
    if not isinstance(rows, Owners):
        return x
    theirs, given, taken = _exchanged(rows)
    found = ranks.exchange_rows(x, given, taken)
    return torch.empty_like(found).index_copy_(0, theirs.to(x.device), found)


def _from_even(x: Tensor, ranks: Ranks, rows: RowsOfRanks) -> Tensor:
    """The other way round."""
    if not isinstance(rows, Owners):
        return x
    theirs, given, taken = _exchanged(rows)
    return ranks.exchange_rows(x[theirs.to(x.device)], taken, given)


def _exchanged(rows: Owners) -> tuple[Tensor, list[int], list[int]]:
    """The rows of Shard(0) on this rank in the order of their owners, and how many are sent.

    There are two numbers for each rank: how many of the own rows Shard(0) has on that rank, and how
    many of that rank's rows Shard(0) has on this one.
    """
    even = _even(rows)
    owner = rows.owner[even.slice]
    there = rows.rows_of(rows.rank).div(max(even.share, 1), rounding_mode="floor")
    given = torch.bincount(there, minlength=rows.size)
    taken = torch.bincount(owner, minlength=rows.size)
    return owner.argsort(stable=True), given.tolist(), taken.tolist()
