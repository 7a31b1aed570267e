"""Tensors with an entry for each class as `DTensor`s of all ranks, and the part of one rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from softsphere._torch import is_dtensor
from softsphere.parallel.shards import Shards

__all__ = ["local_rows", "mesh_of_rows", "own_rows", "whole_tensor"]


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


def local_rows(name: str, x: Tensor, shards: Shards) -> Tensor:
    """The rows of this rank of a weight, whose gradient is that of the weight.

    Raises ValueError for a DTensor over other ranks than those of the layer.
    """
    mesh = mesh_of_rows(name, x)
    if mesh is None:
        return x
    group = shards.ranks.group
    ranks = [dist.get_process_group_ranks(g) for g in (mesh.get_group(), group)]
    if ranks[0] != ranks[1] or list(mesh.get_coordinate()) != [shards.ranks.rank]:
        raise ValueError(
            f"{name} must be sharded over the ranks {ranks[1]} of the layer in the order of their "
            f"process group, got {mesh}"
        )
    given: Any = x
    own: Tensor = given.to_local()
    return own


def whole_tensor(x: Tensor, shards: Shards) -> Tensor:
    """A tensor of all classes that shares the memory of the rows x of this rank."""
    if is_dtensor(x):
        return x
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(shards.ranks.group, x.device.type)
    shape = torch.Size([shards.sharding.num_classes, *x.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    whole: Tensor = DTensor.from_local(
        x.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    return whole


def own_rows(key: str, x: Any, shards: Shards) -> Tensor:
    """The rows of this rank of an entry for all classes.

    Raises ValueError for another number of classes, and for a DTensor that is sharded otherwise.
    """
    from torch.distributed.tensor import DTensor, Shard

    D = shards.sharding.num_classes
    if x.shape[:1] != (D,):
        raise ValueError(
            f"{key} must have {D} rows, those of all ranks together, got shape {tuple(x.shape)}; "
            "the rows of one rank alone cannot be loaded, since they do not say whose they are"
        )
    if not isinstance(x, DTensor):
        # a view would keep the rows of all ranks in memory
        own: Tensor = x[shards.sharding.slice].clone()
        return own
    local: Tensor = x.to_local()
    if tuple(x.placements) != (Shard(0),) or len(local) != len(shards.sharding):
        raise ValueError(
            f"{key} must be sharded by Shard(0) over the {shards.ranks.size} ranks of the layer, "
            f"got {x.placements} with {len(local)} rows on this rank; load it by "
            "torch.distributed.checkpoint into the state_dict() of this layer"
        )
    return local
