"""Checks of vectors with one entry per class: weights, the prior, and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softsphere._torch import has_tangent, values_on_cpu, values_readable
from softsphere.checks.kinds import dense, floating, shown


def class_vector(name: str, value: Any, num_classes: int) -> None:
    """A floating-point tensor with one entry per class."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor with one entry per class, got {shown(value)}")
    floating(name, value)
    if value.shape != (num_classes,):
        raise ValueError(
            f"{name} must have shape ({num_classes},), one entry per class, "
            f"got {tuple(value.shape)}"
        )


def class_weights(value: Any) -> None:
    """A floating-point vector, for a number of classes that is not known yet."""
    if not isinstance(value, Tensor):
        raise TypeError(f"weight must be a tensor with one entry per class, got {shown(value)}")
    floating("weight", value)
    if value.dim() != 1:
        raise ValueError(f"weight must have shape (num_classes,), got {tuple(value.shape)}")


def without_gradient(name: str, value: Tensor | None) -> None:
    """Raises ValueError for a tensor that requires a gradient, or has a forward-mode tangent."""
    if value is not None and (value.requires_grad or has_tangent(value)):
        raise ValueError(
            f"{name} must not require a gradient, since losses have none with respect to it; "
            f"pass {name}.detach()"
        )


def prior(value: Any, dtype: torch.dtype | None = None, *, waits: bool = True) -> Tensor:
    """Returns class frequencies or counts, normalised to Σ π = D.

    They are in float32, or in float64 if `dtype` is. Without a dtype they are in float64 if the
    values are float64 or integers, which float32 could not hold, and else in float32.

    waits: whether a GPU is waited for; otherwise values are looked at on a CPU alone.

    Raises TypeError or ValueError unless all values are positive and finite and need no gradient.
    """
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"prior must be a tensor of class frequencies or counts, got {shown(value)}"
        )
    dense("prior", value)
    if value.dim() != 1 or value.numel() == 0:
        raise ValueError(f"prior must have shape (num_classes,), got {tuple(value.shape)}")
    without_gradient("prior", value)
    wide = value.double()
    looks = values_readable(value) if waits else values_on_cpu(value)
    if looks and not bool(((wide > 0) & wide.isfinite()).all()):
        raise ValueError(
            "prior must be positive and finite for every class, got values from "
            f"{value.min().item():g} to {value.max().item():g}; "
            "give classes that were never seen a small count, such as counts + 1"
        )
    if dtype is None:
        dtype = value.dtype if value.is_floating_point() else torch.float64
    pi = wide * (value.numel() / wide.sum())
    narrow = pi.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if looks:
        _refuse_zeros(pi, narrow)
    return narrow


def loaded_prior(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a prior that is loaded or assigned as `prior` does, a normalised one to its last bit.

    Normalising it again could change the last bit of what was saved.
    """
    pi = prior(value, dtype)
    if value.dtype == pi.dtype and values_readable(value):
        error = abs(float(value.double().sum()) / value.numel() - 1)
        # Rounding the entries changes their sum by at most half an eps.
        if error <= 4 * torch.finfo(value.dtype).eps:
            same: Tensor = value.detach().clone()
            return same
    return pi


def normalised_prior(pi: Tensor) -> None:
    """Raises ValueError for a base measure without Σ π = D, on a CPU.

    A buffer can be changed in place, and torch.func.functional_call replaces it.
    """
    if not values_on_cpu(pi):
        return
    total = float(pi.sum(dtype=torch.float64))
    if not abs(total - len(pi)) <= 1e-5 * len(pi):  # NaN is refused as well
        raise ValueError(
            f"the buffer prior must sum to num_classes = {len(pi)}, got {total:g}; assign the "
            "counts to the attribute prior, which normalises them"
        )


def narrowed_prior(pi: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a base measure in `dtype`. On a CPU, raises ValueError if an entry becomes zero."""
    narrow = pi.to(dtype)
    if dtype != pi.dtype and values_on_cpu(pi):
        _refuse_zeros(pi, narrow)
    return narrow


def _refuse_zeros(pi: Tensor, narrow: Tensor) -> None:
    if not bool((narrow > 0).all()):
        raise ValueError(
            f"prior spans more than {narrow.dtype} holds: its smallest share is "
            f"{(pi.min() / pi.sum()).item():g}; give rare classes larger counts"
        )


def class_mask(mask: Any, shape: torch.Size, dim: int) -> Tensor:
    """Returns a boolean mask (C), or of the shape of logits with its classes moved to the end."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else repr(mask)
        raise TypeError(
            f"mask must be a boolean tensor, True where a class takes part, got {came}; "
            "for a mask that is added to logits use mask == 0"
        )
    dense("mask", mask)
    if mask.shape == shape:
        return mask.movedim(dim, -1)
    if mask.shape == shape[dim : dim + 1]:
        return mask
    raise ValueError(
        f"mask must have shape ({shape[dim]},), one entry per class, or the shape of the logits "
        f"{tuple(shape)}, got {tuple(mask.shape)}"
    )
