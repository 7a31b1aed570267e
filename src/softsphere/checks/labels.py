"""Checks of targets: class indices, class probabilities and K-sparse targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere._torch import assert_later, values_on_cpu, values_readable
from softsphere.checks.kinds import dense, floating, is_integer, shown
from softsphere.unread import step_is_recorded

_INDICES = "class indices must be integers, target.long()"


def target_shape(logits: Tensor, dim: int, target: Any) -> None:
    """Class indices with the shape of logits less its class dimension, or class probabilities."""
    dense("target", target)
    if target.is_floating_point():
        floating("target", target)
        if target.shape != logits.shape:
            raise ValueError(
                f"target of class probabilities must have the shape of logits "
                f"{tuple(logits.shape)}, got {tuple(target.shape)}; {_INDICES}"
            )
        return
    if not is_integer(target):
        raise TypeError(
            f"target must hold class indices (torch.int64) or class probabilities "
            f"(floating-point), got {target.dtype}; {_INDICES}"
        )
    rows = logits.shape[:dim] + logits.shape[dim + 1 :]
    if target.shape != rows:
        raise ValueError(
            f"target of class indices must have shape {tuple(rows)} for logits of shape "
            f"{tuple(logits.shape)}, got {tuple(target.shape)}"
            f"{_without_last(target, rows) or _classes_last(logits, target)}"
        )


def indices(target: Tensor, allowed: Tensor, num_classes: int, spared: str) -> None:
    """Every index is in [0, C) except where `allowed`; `spared` describes the allowed ones.

    A GPU asserts it without a synchronisation, as its gather does. Not every engine gathers.
    """
    if not target.numel():
        return
    if not values_on_cpu(target):
        _assert_in_range("target", target, num_classes, spared, allowed)
        return
    least, most = target.aminmax()
    if least >= 0 and most < num_classes:
        return
    bad = ((target < 0) | (target >= num_classes)) & ~allowed
    if bool(bad.any()):
        raise ValueError(
            f"target must be in [0, {num_classes}){spared}, got {target[bad][0].item()}"
        )


def _assert_in_range(
    name: str, index: Tensor, num_classes: int, spared: str, allowed: Tensor | None = None
) -> None:
    """Has a GPU assert that every index is in [0, C), or allowed, unless it is traced.

    So does a step that is recorded on a CPU, whenever it is taken.
    """
    if index.device.type not in ("cpu", "cuda"):
        return
    if not (step_is_recorded() or values_readable(index)):
        return
    fits = (index >= 0) & (index < num_classes)
    fits = fits if allowed is None else fits | allowed
    assert_later(fits.all(), f"{name} must be in [0, {num_classes}){spared}")


def masked_targets(chosen: Tensor) -> None:
    """Raises ValueError if a target is a class that does not take part, on a CPU."""
    if values_on_cpu(chosen) and bool(chosen.any()):
        raise ValueError(
            "target must be a class that takes part, got one whose mask is False; "
            "leave it in the mask, or ignore the row by ignore_index"
        )


def _sparse_kinds(target: Any, values: Any) -> None:
    """K-sparse targets are integers, with real values of the same shape."""
    dense("target", target)
    dense("target_values", values)
    if not is_integer(target):
        raise TypeError(f"target must hold class indices with target_values, got {target.dtype}")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"target_values must be real numbers, got {values.dtype}")
    if target.shape != values.shape:
        raise ValueError(
            f"target_values must have the shape of target {tuple(target.shape)}, "
            f"got {tuple(values.shape)}"
        )


def sparse_targets(o: Tensor, target: Any, values: Any) -> None:
    """K-sparse targets (N, K) or (K), with real values of the same shape."""
    _sparse_kinds(target, values)
    if o.dim() > 2 or target.dim() != o.dim() or target.shape[:-1] != o.shape[:-1]:
        raise ValueError(
            "target with target_values must have shape (N, K) for logits (N, C), or (K) for (C); "
            f"got {tuple(target.shape)}"
        )


def sparse_rows(rows: torch.Size, target: Any, values: Any) -> None:
    """K-sparse targets (…, K) with values, for rows (…)."""
    _sparse_kinds(target, values)
    if target.dim() != len(rows) + 1 or target.shape[:-1] != rows:
        raise ValueError(
            f"target with target_values must have shape (…, K) for rows {tuple(rows)}, "
            f"got {tuple(target.shape)}"
        )


def probability_rows(shape: tuple[int, ...], target: Tensor) -> None:
    """Class probabilities, one row of them for each row of the input."""
    dense("target", target)
    if target.shape != shape:
        raise ValueError(
            f"target of class probabilities must have shape {shape}, got {tuple(target.shape)}; "
            f"{_INDICES}"
        )


def rows_target(rows: torch.Size, target: Any, name: str = "hidden") -> None:
    """Class indices, one for each row."""
    dense("target", target)
    if not is_integer(target):
        probabilities = target.is_floating_point() and target.shape != rows
        raise TypeError(
            f"target must hold class indices (torch.int64), got {target.dtype}"
            + (
                "; use LinearSphericalLoss for class probabilities, since they need all logits"
                if probabilities
                else "; use target.long() if they are class indices"
            )
        )
    if target.shape != rows:
        raise ValueError(
            f"target must have the leading shape of {name} {tuple(rows)}, got "
            f"{tuple(target.shape)}{_without_last(target, rows)}"
        )


def _without_last(target: Tensor, rows: torch.Size) -> str:
    """How to mend class indices (…, 1) for rows (…)."""
    return "; use target.squeeze(-1)" if target.shape == (*rows, 1) else ""


def _classes_last(logits: Tensor, target: Tensor) -> str:
    """How to mend logits (…, C) of several dimensions, whose classes are expected at 1."""
    if target.shape != logits.shape[:-1]:
        return ""
    return (
        "; classes are expected at dimension 1, so use logits.movedim(-1, 1), or flatten both to "
        "logits of shape (N, C) and a target of shape (N,)"
    )


def classes(
    value: Any, num_classes: int, name: str = "classes", padding: int | None = None
) -> Tensor:
    """Returns class indices of any integer dtype as int64, every one in [0, D) or the padding."""
    if not is_integer(value):
        came = value.dtype if isinstance(value, Tensor) else shown(value)
        raise TypeError(f"{name} must be a tensor of class indices (torch.int64), got {came}")
    dense(name, value)
    found: Tensor = value.long()
    spared = "" if padding is None else f" or {padding} for padding"
    if not values_on_cpu(found):
        allowed = None if padding is None else found == padding
        _assert_in_range(name, found, num_classes, spared, allowed)
    elif found.numel():
        real = found if padding is None else found[found != padding]
        bad = real[(real < 0) | (real >= num_classes)]
        if len(bad):
            ignored = bool(bad[0] < 0) and padding is None
            raise ValueError(
                f"{name} must be in [0, {num_classes}){spared}, got {int(bad[0])}"
                + ("; leave out rows that a loss ignores, which have no class" if ignored else "")
            )
    return found


def excluded(value: Any, rows: torch.Size, num_classes: int, k: int) -> Tensor:
    """Returns the classes (…, n) that rows (…) leave out, −1 for none, as int64.

    Raises ValueError if a row might have fewer than k classes left.
    """
    found = classes(value, num_classes, "exclude", padding=-1)
    if found.dim() != len(rows) + 1 or found.shape[:-1] != rows:
        raise ValueError(
            f"exclude must have shape (…, n) for rows {tuple(rows)} of hidden, "
            f"got {tuple(found.shape)}"
        )
    if k + found.shape[-1] > num_classes:
        raise ValueError(
            f"exclude must leave at least k = {k} of the {num_classes} classes in every row, got "
            f"{found.shape[-1]} entries a row; pass a smaller k, or less padding"
        )
    return found
