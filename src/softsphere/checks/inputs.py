"""Checks of logits, of hidden states and of the parameters of a linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import is_dtensor
from softsphere.checks.class_vectors import class_vector
from softsphere.checks.kinds import floating
from softsphere.checks.settings import integer

# What errors call the rows, weight and bias of a linear layer.
LINEAR_NAMES = ("input", "linear_weight", "linear_bias")

LOGITS = "(C), (N, C) or (N, C, d1, …)"


def logits_shape(input: Any) -> int:
    """Returns the class dimension of logits of shape (C), (N, C) or (N, C, d1, …)."""
    floating("input", input)
    if input.dim() == 0:
        raise ValueError(f"input must hold logits of shape {LOGITS}, got a scalar")
    dim = 0 if input.dim() == 1 else 1
    if input.shape[dim] == 0:
        raise ValueError(
            f"input must hold logits of at least one class, got shape {tuple(input.shape)}"
        )
    return dim


def mask_numbers(lost: Tensor, demand: str = "input must hold finite logits") -> None:
    """Raises ValueError if logits (..., C) or a bias (C) without a finite loss mask classes.

    Such a mask is −∞, about the smallest number of the dtype, or one number in several places whose
    square overflows, beside logits that are not large. Otherwise the model may diverge.
    """
    smallest = torch.finfo(lost.dtype).min
    lost = lost.detach() if lost.dtype == torch.float64 else lost.detach().float()
    limit = math.sqrt(torch.finfo(lost.dtype).max / lost.shape[-1])
    low = lost[lost < -limit]
    if not low.numel() or not bool((lost <= limit).all()):
        return
    least = float(low.min())
    repeated = low.numel() > 1 and bool((low == least).all())
    if float(low.max()) <= smallest / 2 or repeated:
        came = "−inf" if math.isinf(least) else f"{least:g}, whose square overflows"
        raise ValueError(
            f"{demand} for this loss, got {came}; for classes that do not take part pass mask=…, "
            "True for those that do"
        )


def along(input: Any, dim: Any) -> int:
    """Returns a dimension of logits. A tensor without dimensions has the dimensions 0 and −1."""
    floating("input", input)
    dims, chosen = max(input.dim(), 1), integer("dim", dim)
    if not -dims <= chosen < dims:
        raise ValueError(
            f"dim must be a dimension of input of shape {tuple(input.shape)}, got {chosen}"
        )
    return chosen


def hidden(value: Any, in_features: int, name: str = "hidden") -> None:
    """Floating-point rows of in_features numbers, with any leading shape."""
    floating(name, value)
    if value.dim() == 0 or value.shape[-1] != in_features:
        raise ValueError(
            f"{name} must have shape (…, in_features = {in_features}), got {tuple(value.shape)}"
        )


def linear(input: Any, weight: Any, bias: Any, names: tuple[str, str, str] = LINEAR_NAMES) -> None:
    """Rows (…, d), a weight (D, d) with D ≥ 1 and a bias (D), which errors call by `names`."""
    rows_name, weight_name, bias_name = names
    floating(weight_name, weight)
    if weight.dim() != 2 or len(weight) == 0:
        raise ValueError(
            f"{weight_name} must have shape (num_classes, in_features) with at least one class, "
            f"got {tuple(weight.shape)}"
        )
    hidden(input, weight.shape[1], rows_name)
    same_device(weight_name, weight, rows_name, input)
    if bias is not None:
        class_vector(bias_name, bias, len(weight))
        same_device(bias_name, bias, rows_name, input)


def K_dimensional(input: Any, weight: Tensor, bias: Any) -> None:
    """Rows (N, d) or (d), a weight (C, d1, …, dK, d) and a bias (C, d1, …, dK)."""
    floating("linear_weight", weight)
    if weight.numel() == 0:
        raise ValueError(
            f"linear_weight must have at least one class, got shape {tuple(weight.shape)}"
        )
    hidden(input, weight.shape[-1], "input")
    if input.dim() != 2:
        raise ValueError(
            f"input must have shape (N, in_features) for linear_weight of shape "
            f"{tuple(weight.shape)}, got {tuple(input.shape)}"
        )
    same_device("linear_weight", weight, "input", input)
    if bias is not None:
        floating("linear_bias", bias)
        same_device("linear_bias", bias, "input", input)
        if bias.shape != weight.shape[:-1]:
            raise ValueError(
                f"linear_bias must have shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}"
            )


def same_dtype(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str, str, str] = LINEAR_NAMES,
) -> None:
    """The same dtype for all, as `F.linear` requires."""
    rows_name, *rest = names
    for name, x in zip(rest, (weight, bias), strict=True):
        if x is not None and x.dtype != input.dtype:
            raise TypeError(
                f"{name} must have the dtype of {rows_name} {input.dtype}, got {x.dtype}; "
                f"use {rows_name}.to({name}.dtype)"
            )


def same_device(name: str, value: Any, of: str, other: Tensor) -> None:
    """Tensors on one device, and both or neither of them a DTensor."""
    if isinstance(value, Tensor) and is_dtensor(value) != is_dtensor(other):
        kinds = ("a DTensor", "an ordinary tensor")
        kind, of_other = kinds if is_dtensor(value) else kinds[::-1]
        raise TypeError(
            f"{name} is {kind}, but {of} is {of_other}; make the output layer by "
            "LinearSphericalLoss.from_linear(linear, replicated=…) for a weight that is sharded "
            "over ranks, give to_local() of other DTensors, or distribute both"
        )
    if isinstance(value, Tensor) and value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {of}, {other.device}, got {value.device}; "
            f"use {name}.to({of}.device)"
        )
