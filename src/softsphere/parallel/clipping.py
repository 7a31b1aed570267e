"""Clips gradients by their norm, where some layers are sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softsphere.parallel.shards import rows_of_one_rank

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Clips the gradients of a model with sharded output layers by their norm.

    `torch.nn.utils.clip_grad_norm_` sees the rows of one rank alone. Each rank would find another
    norm and scale the layers below by another factor. This function adds the squares of sharded
    gradients over the ranks, and takes all others as the same on every rank. All ranks must call
    it.

    Args:
        model: a module whose gradients are complete.
        max_norm: the largest Euclidean norm.

    Returns the norm before clipping, on the CPU, in the default dtype.

    Sparse gradients are clipped as well. A collective raises RuntimeError if a rank does not call.
    Raises TypeError for parameters in place of the model.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> clip_grad_norm_(model, 1.0), model.weight.grad
    (tensor(5.), tensor([[0.6000, 0.8000]]))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be an nn.Module, got a {type(model).__name__}; give it the model, which "
            "knows the rows of which parameters are those of one rank"
        )
    layers: list[Any] = [x for x in model.modules() if getattr(x, "shards", None) is not None]
    sharded = {id(p) for x in layers for p in rows_of_one_rank(x).values()}
    rest = [p for p in model.parameters() if id(p) not in sharded and p.grad is not None]
    squares = _sum_of_squares(rest)
    seen: set[int] = set()
    for layer in layers:
        own = _sum_of_squares(_trained(layer, seen))
        if not layer.norm_is_of_all:
            ranks = layer.shards.ranks
            own = ranks.sum(own.to(ranks.device)).cpu()
        squares += own
    norm = squares.sqrt()
    scale = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(scale)
    return norm.to(torch.get_default_dtype())


def _trained(layer: nn.Module, seen: set[int]) -> Iterator[nn.Parameter]:
    """The parameters of a layer with a gradient, unless an earlier layer has them, too."""
    for p in rows_of_one_rank(layer).values():
        if p.grad is not None and id(p) not in seen:
            seen.add(id(p))
            yield p


def _sum_of_squares(params: Iterable[Tensor]) -> Tensor:
    """The sum of squares of the gradients, in float64 on the CPU, which waits for each GPU once."""
    of_device: dict[torch.device, list[Tensor]] = {}
    for p in params:
        grad: Any = p.grad
        values = grad.coalesce().values() if grad.is_sparse else grad
        norm: Any = torch.linalg.vector_norm(values).detach()
        # that of a gradient that fully_shard has sharded is a DTensor
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        of_device.setdefault(norm.device, []).append(norm.double())
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for norms in of_device.values():
        total += torch.stack(norms).square().sum().cpu()
    return total
