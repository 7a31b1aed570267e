"""The state of an optimizer for parameters whose rows are sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from softsphere.parallel.agreement import Agreement
from softsphere.parallel.ranks import Ranks
from softsphere.parallel.sharding import RowsOfRanks
from softsphere.parallel.shards import rows_of_one_rank
from softsphere.parallel.whole import check_rows, own_rows, whole_tensor

__all__ = ["keep_whole_state"]

# The ranks of a parameter, and which of its rows each of them has.
_Held = tuple[Ranks, RowsOfRanks]


def keep_whole_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Has an optimizer save and load its state for sharded layers as that of all classes.

    Without it `optimizer.state_dict()` has the rows of one rank under a name that all ranks share,
    and torch.distributed.checkpoint would keep those of one rank alone. With it the state has
    DTensors with the placement Shard(0), like the `state_dict` of the layers, and it may be loaded
    on another number of ranks. Call it once, before the state is saved or loaded, which all ranks
    must then do together.
    `softsphere.optim.FactoredSGD` does so for factored weights by itself.

    Args:
        optimizer: of some parameters of the model.
        model: with sharded layers.

    >>> model = nn.Linear(2, 2)
    >>> keep_whole_state(torch.optim.Adam(model.parameters()), model)
    """
    held: dict[int, _Held] = {}
    for layer in model.modules():
        shards: Any = getattr(layer, "shards", None)
        # the optimizer of a factored weight does so by itself
        if shards is not None and not layer.norm_is_of_all:
            rows: Any = layer.rows_of_ranks
            named = rows_of_one_rank(layer).items()
            held |= {id(p): (shards.ranks, rows(name)) for name, p in named}

    def saved(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        def whole(name: str, x: Tensor, p: Tensor) -> Tensor:
            if x.dim() and x.shape != p.shape:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps {name} of shape {tuple(x.shape)} for a "
                    f"sharded weight of shape {tuple(p.shape)}, and only states of single entries "
                    "can be saved for all ranks; use an optimizer that acts on single entries, "
                    "such as Adam"
                )
            return whole_tensor(x, *held[id(p)]) if x.shape == p.shape else x

        return _converted(optimizer, state_dict, held, whole)

    def loaded(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        def check(name: str, x: Tensor, p: Tensor) -> Tensor:
            if x.dim() == p.dim():
                check_rows(name, x, *held[id(p)])
            return x

        def own(name: str, x: Tensor, p: Tensor) -> Tensor:
            return own_rows(name, x, *held[id(p)]) if x.dim() == p.dim() else x

        # an error on one rank is one on all, before rows are sent
        with ExitStack() as stack:
            for ranks in {id(ranks.group): ranks for ranks, _ in held.values()}.values():
                stack.enter_context(Agreement(ranks, "the loading of an optimizer's state"))
            _converted(optimizer, state_dict, held, check)
        return _converted(optimizer, state_dict, held, own)

    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loaded)


def _converted(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    held: dict[int, _Held],
    convert: Callable[[str, Tensor, Tensor], Tensor],
) -> dict[str, Any]:
    """A state_dict with the tensors of sharded parameters converted."""
    state = dict(state_dict["state"])
    for key, p in _parameters(optimizer, state_dict):
        if id(p) in held and key in state:
            state[key] = {
                name: convert(name, x, p) if isinstance(x, Tensor) else x
                for name, x in state[key].items()
            }
    return {**state_dict, "state": state}


def _parameters(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> Iterator[tuple[Any, Tensor]]:
    """The keys of parameters in a state_dict, and the parameters."""
    groups = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    for packed, group in groups:
        yield from zip(packed["params"], group["params"], strict=True)
