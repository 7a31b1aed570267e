"""Every check of what a caller passed: names the argument, what came, and how to mend it."""

from __future__ import annotations

import math
import numbers
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["even_order", "finite", "non_negative", "positive", "prior", "readable"]


# What errors call the rows, weight and bias of a linear layer.
LINEAR_NAMES = ("input", "linear_weight", "linear_bias")


def number(name: str, value: Any) -> float:
    """A real number, as the argument `name`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return cast(float, value)


def finite(name: str, value: float) -> None:
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}")


def positive(name: str, value: float) -> None:
    if not (math.isfinite(number(name, value)) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def non_negative(name: str, value: float) -> None:
    if not (math.isfinite(number(name, value)) and value >= 0):
        raise ValueError(f"{name} must be zero or positive, and finite, got {value}")


def even_order(order: int) -> None:
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be an even integer, got {order!r}")
    if not 2 <= order <= 20 or order % 2:
        raise ValueError(
            f"order must be even and from 2 to 20, got {order}: a Taylor polynomial of odd order "
            "is negative somewhere, and one of high order is the exponential"
        )


def readable(x: Tensor) -> bool:
    """Whether x has values that Python may look at: not while traced or faked, not inside vmap."""
    if torch.compiler.is_compiling() or x.is_meta or torch._C._len_torch_dispatch_stack():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


def values_on_cpu(x: Tensor) -> bool:
    """Whether the values of x may be checked without waiting for a device."""
    return x.device.type == "cpu" and readable(x)


def class_vector(name: str, value: Tensor, num_classes: int) -> None:
    """A floating tensor with one entry a class."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor with one entry a class, got {value!r}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {value.dtype}; use {name}.float()")
    if value.shape != (num_classes,):
        raise ValueError(
            f"{name} must have shape ({num_classes},), one entry a class, got {tuple(value.shape)}"
        )


def prior(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Class frequencies or counts, normalised to Σ π = D; in float32 or wider if not in dtype."""
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"prior must be a tensor of class frequencies or counts, got {value!r}")
    if value.dim() != 1 or value.numel() == 0:
        raise ValueError(f"prior must have shape (num_classes,), got {tuple(value.shape)}")
    if readable(value) and not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError(
            "prior must be positive and finite for every class, got values from "
            f"{value.min().item():g} to {value.max().item():g}; "
            "give classes that were never seen a small count, such as counts + 1"
        )
    wide = value.double()
    if dtype is None:
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    pi = (wide * (value.numel() / wide.sum())).to(dtype)
    if readable(pi) and not bool((pi > 0).all()):
        raise ValueError(
            f"prior spans more than {dtype} holds: its smallest share is "
            f"{(wide.min() / wide.sum()).item():g}; give rare classes larger counts"
        )
    return pi


def floating_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {logits!r}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, got {logits.dtype}; use logits.float()")


def along(logits: Tensor, dim: int) -> None:
    """Logits with at least one class in their dimension `dim`."""
    floating_logits(logits)
    if not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"dim must be a dimension of logits {tuple(logits.shape)}, got {dim}")
    if logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(logits.shape)}")


def logits_shape(logits: Tensor) -> int:
    """The class dimension of logits of shape (C), (N, C) or (N, C, d1, …)."""
    floating_logits(logits)
    if logits.dim() == 0:
        raise ValueError("logits must have shape (C), (N, C) or (N, C, d1, …), got a scalar")
    dim = 0 if logits.dim() == 1 else 1
    if logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(logits.shape)}")
    return dim


def target_shape(logits: Tensor, dim: int, target: Tensor) -> None:
    """Class indices with the shape of logits less its class dimension, or class probabilities."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {target!r}")
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target of class probabilities must have the shape of logits "
                f"{tuple(logits.shape)}, got {tuple(target.shape)}; class indices must be integers"
            )
        return
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(
            f"target must hold class indices (torch.int64) or class probabilities "
            f"(floating-point), got {target.dtype}"
        )
    rows = logits.shape[:dim] + logits.shape[dim + 1 :]
    if target.shape != rows:
        raise ValueError(
            f"target of class indices must have shape {tuple(rows)} for logits of shape "
            f"{tuple(logits.shape)}, got {tuple(target.shape)}"
        )


def indices(target: Tensor, allowed: Tensor, num_classes: int, spared: str) -> None:
    """Every index is in [0, C) but where `allowed`; `spared` says what is."""
    if not readable(target) or target.device.type != "cpu":
        return  # A GPU's own gather asserts it without a synchronisation.
    bad = ((target < 0) | (target >= num_classes)) & ~allowed
    if bool(bad.any()):
        raise ValueError(
            f"target must be in [0, {num_classes}) or {spared}, got {target[bad][0].item()}"
        )


def integer(name: str, value: Any) -> int:
    """Returns an integer of Python, NumPy or another package as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Returns a value that must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def index(name: str, value: Any) -> None:
    integer(name, value)


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def label_smoothing(value: float) -> None:
    if not 0 <= number("label_smoothing", value) <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {value}")


def sparse_kinds(target: Tensor, values: Tensor) -> None:
    """K-sparse targets are integers with real values of their shape."""
    for name, x in (("target", target), ("target_values", values)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {x!r}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold class indices with target_values, got {target.dtype}")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"target_values must be real numbers, got {values.dtype}")
    if target.shape != values.shape:
        raise ValueError(
            f"target_values must have the shape of target {tuple(target.shape)}, "
            f"got {tuple(values.shape)}"
        )


def sparse_targets(o: Tensor, target: Tensor, values: Tensor) -> None:
    """K-sparse targets (N, K) or (K), integers, with real values of their shape."""
    sparse_kinds(target, values)
    if o.dim() > 2 or target.dim() != o.dim() or target.shape[:-1] != o.shape[:-1]:
        raise ValueError(
            "target with target_values must have shape (N, K) for logits (N, C), or (K) for (C); "
            f"got {tuple(target.shape)}"
        )


def at_least_one(name: str, value: Any) -> int:
    """Returns a positive integer of Python, NumPy or another package as an int."""
    size = integer(name, value)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def sizes(**values: int) -> None:
    """Numbers of rows, classes, …; none may be less than nothing."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def floating_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")


def floating(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a floating-point tensor, got {came}")


def hidden(value: Tensor, in_features: int, name: str = "hidden") -> None:
    """Floating rows of in_features numbers, any leading shape."""
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
    if bias is not None:
        class_vector(bias_name, bias, len(weight))


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


def probability_rows(shape: tuple[int, ...], target: Tensor) -> None:
    """Class probabilities, one row of them for each row of input."""
    if target.shape != shape:
        raise ValueError(
            f"target of class probabilities must have shape {shape}, got {tuple(target.shape)}; "
            "class indices must be integers"
        )


def rows_target(rows: torch.Size, target: Tensor, name: str = "hidden") -> None:
    """Class indices, one a row."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {target!r}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"target must hold class indices (torch.int64), got {target.dtype}; dense class "
            "probabilities need the logits: use SphericalLoss on them, or target_values"
        )
    if target.shape != rows:
        raise ValueError(
            f"target must have the leading shape of {name} {tuple(rows)}, got {tuple(target.shape)}"
        )


def sparse_rows(rows: torch.Size, target: Tensor, values: Tensor) -> None:
    """K-sparse targets (…, K) with values for rows (…)."""
    sparse_kinds(target, values)
    if target.dim() != len(rows) + 1 or target.shape[:-1] != rows:
        raise ValueError(
            f"target with target_values must have shape (…, K) for rows {tuple(rows)}, "
            f"got {tuple(target.shape)}"
        )


def classes(value: Any, num_classes: int, name: str = "classes") -> Tensor:
    """Returns class indices of any integer dtype as int64, every one in [0, D)."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        known = False
    else:
        known = not (value.is_floating_point() or value.is_complex())
    if not known:
        came = value.dtype if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a tensor of class indices (torch.int64), got {came}")
    value = value.long()
    if readable(value) and value.device.type == "cpu" and value.numel():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= num_classes:
            bad = low if low < 0 else high
            raise ValueError(f"{name} must be in [0, {num_classes}), got {bad}")
    return cast(Tensor, value)
