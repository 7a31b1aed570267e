"""Tensors with an entry for each class as `DTensor`s of all ranks, and the part of one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere.parallel.shards import Shards

__all__ = ["is_dtensor", "own_rows", "whole_tensor"]


def is_dtensor(x: Any) -> bool:
    """Whether x is a tensor of torch.distributed.tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def whole_tensor(x: Tensor, shards: Shards) -> Tensor:
    """A tensor of all classes that shares the memory of the rows x of this rank."""
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
