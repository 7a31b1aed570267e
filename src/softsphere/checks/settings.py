"""Checks of settings: plain numbers, names and flags."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, cast

import torch
from torch import Tensor


def number(name: str, value: Any) -> float:
    """Returns a real number, which may be NumPy's."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return cast(float, value)


def finite(name: str, value: float) -> None:
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}")


def only_with_a_group(name: str, value: Any) -> None:
    """Raises ValueError for an argument that has a meaning with a process group alone."""
    if value is not None:
        raise ValueError(
            f"{name} has a meaning with a process_group alone, got {value}; use reduction='sum' "
            "and divide by it"
        )


def positive(name: str, value: float) -> None:
    if not (math.isfinite(number(name, value)) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def non_negative(name: str, value: float) -> None:
    if not (math.isfinite(number(name, value)) and value >= 0):
        raise ValueError(f"{name} must be zero or positive, and finite, got {value}")


def integer(name: str, value: Any) -> int:
    """Returns an integer as an int. It may be NumPy's, or a tensor without dimensions."""
    if isinstance(value, Tensor) and value.dim() == 0:
        kind = value.dtype
        if not (kind.is_floating_point or kind.is_complex or kind == torch.bool):
            return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # as it is, so that a symbolic size stays symbolic
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def at_least_one(name: str, value: Any) -> int:
    size = integer(name, value)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def sizes(**values: Any) -> None:
    """Numbers of rows, classes and the like: integers that are not negative."""
    for name, value in values.items():
        if integer(name, value) < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def number_of_best(name: str, value: Any, num_classes: int) -> int:
    """Returns the k of a topk, from 1 to the number of classes."""
    k = integer(name, value)
    if not 1 <= k <= num_classes:
        raise ValueError(f"{name} must be from 1 to num_classes = {num_classes}, got {k}")
    return k


def even_order(order: Any) -> None:
    if isinstance(order, bool) or not isinstance(order, numbers.Integral):
        raise TypeError(f"order must be an even integer, got {order!r}")
    if not 2 <= int(order) <= 20 or int(order) % 2:
        raise ValueError(
            f"order must be even and from 2 to 20, got {order}: a Taylor polynomial of odd order "
            "is negative somewhere, and one of high order is the exponential"
        )


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def reduction(value: str, size_average: Any, reduce: Any) -> str:
    """Returns the reduction that `size_average` and `reduce` stand for, or `value` without them."""
    if size_average is None and reduce is None:
        return value
    average = size_average is None or flag("size_average", size_average)
    summed = reduce is None or flag("reduce", reduce)
    found = ("mean" if average else "sum") if summed else "none"
    warnings.warn(
        f"size_average and reduce are deprecated; use reduction={found!r} instead", stacklevel=3
    )
    return found


def ignore_index(value: Any) -> int | None:
    """Returns the index as an int, or None if no row is ignored."""
    return None if value is None else integer("ignore_index", value)


def label_smoothing(value: Any) -> float:
    """Returns the share as a number. It may be a tensor without dimensions."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        if value.requires_grad:
            raise ValueError(
                "label_smoothing must not require a gradient; pass label_smoothing.detach()"
            )
        value = float(value)
    if not 0 <= number("label_smoothing", value) <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {value}")
    return cast(float, value)


def floating_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
