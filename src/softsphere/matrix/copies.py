"""Operations that make another factored weight or gradient: an alias, a copy, or an empty one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softsphere.matrix.abstract import Block
from softsphere.matrix.gradient_tensors import Content, StructuredGradient
from softsphere.matrix.refusals import HALF, refusal
from softsphere.matrix.tensors import FactoredTensor


def same_weight(func: Any, x: FactoredTensor) -> FactoredTensor:
    return FactoredTensor.alias(x.block)


def same_gradient(func: Any, g: StructuredGradient) -> StructuredGradient:
    return StructuredGradient(g.content)


def same_view(func: Any, x: FactoredTensor, shape: Sequence[int]) -> FactoredTensor:
    if tuple(shape) not in (tuple(x.shape), (-1, x.shape[1]), (x.shape[0], -1)):
        raise refusal(func, x.described)
    return FactoredTensor.alias(x.block)


def clone_weight(func: Any, x: FactoredTensor, memory_format: Any = None) -> FactoredTensor:
    return copied(x, x.device, x.dtype)


def clone_gradient(
    func: Any, g: StructuredGradient, memory_format: Any = None
) -> StructuredGradient:
    return StructuredGradient(Content(g.value, g.content.block, g.content.edition))


def _full_precision(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    dtype = dtype or x.dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{HALF}; got {dtype}")
    return dtype


def copied(x: FactoredTensor, device: torch.device, dtype: torch.dtype) -> FactoredTensor:
    """Returns a copy of a weight on a device and in a dtype."""
    return FactoredTensor.alias(Block(x.matrix.copied(x.block.j, device, dtype)))


def convert_weight(
    func: Any, x: FactoredTensor, *, dtype: Any = None, device: Any = None, **_: Any
) -> FactoredTensor:
    return copied(x, torch.device(device or x.device), _full_precision(dtype, x))


def convert_gradient(
    func: Any, g: StructuredGradient, *, dtype: Any = None, device: Any = None, **_: Any
) -> StructuredGradient:
    value = g.value.to(_full_precision(dtype, g), torch.device(device or g.device))
    return StructuredGradient(Content(value, g.content.block, g.content.edition))


def empty_like_weight(
    func: Any, x: FactoredTensor, *, dtype: Any = None, device: Any = None, **_: Any
) -> FactoredTensor:
    W, dtype, device = x.matrix.arrays, _full_precision(dtype, x), torch.device(device or x.device)
    sizes = [block.shape[1] for block in W.V.blocks]
    if W.blocks > 1:
        sizes = sizes[:-1] if x.block.j == 0 else sizes[-1:]
    blocks = [torch.empty(W.num_rows, size, dtype=dtype, device=device) for size in sizes]
    pi = W.pi
    if pi is not None and not pi.is_meta and device.type != "meta":
        pi = pi.to(device, dtype)
    return FactoredTensor.alias(Block(x.matrix.like(blocks, pi)))


def new_empty(
    func: Any, x: Tensor, size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return torch.empty(size, dtype=dtype or x.dtype, device=device or x.device)


def empty_gradient(func: Any, g: StructuredGradient, *_: Any, **__: Any) -> StructuredGradient:
    return StructuredGradient(Content(g.content.block.matrix.zero(), g.content.block, None))


def zero_gradient(
    func: Any, x: FactoredTensor, *, memory_format: Any = None, **_: Any
) -> StructuredGradient:
    """Returns a gradient that is zero, as torch.distributed.checkpoint makes for a new optimizer.

    A memory format is refused, since the optimizers of PyTorch that keep numbers for each weight
    pass one.
    """
    if memory_format is not None:
        raise refusal(func, x.described)
    return StructuredGradient(Content(x.matrix.zero(), x.block, None))
