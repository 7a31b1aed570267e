"""Checks of what clusters of classes are made from: counts, sizes, vectors and tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softsphere.checks.kinds import dense, floating, is_integer, shown
from softsphere.checks.settings import at_least_one, finite, integer, non_negative, number


def class_counts(value: Any) -> Tensor:
    """Returns counts (D) in float64 on the CPU. Classes without any count like the rarest one."""
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"counts must be a tensor of class counts or frequencies, got {shown(value)}"
        )
    dense("counts", value)
    if value.dim() != 1 or value.numel() == 0:
        raise ValueError(
            f"counts must have shape (num_classes,), got {tuple(value.shape)}; for a stream of "
            "class indices use torch.bincount(indices, minlength=num_classes)"
        )
    counts = value.detach().to("cpu", torch.float64)
    wrong = ~((counts >= 0) & counts.isfinite())
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ValueError(
            "counts must be zero or positive, and finite, for every class, "
            f"got {counts[place].item():g} for class {place}"
        )
    seen = counts > 0
    if not bool(seen.any()):
        raise ValueError(
            "counts must be positive for some class, got zeros only; "
            "without any counts pass torch.ones(num_classes)"
        )
    if not bool(counts.sum().isfinite()):
        raise ValueError(
            f"counts must have a finite sum, got up to {counts.max().item():g}; divide them by it"
        )
    rarest = counts[seen].min()
    return torch.where(seen, counts, rarest)


def shortlist_size(value: Any, num_classes: int) -> int:
    """Returns the size of a shortlist, which leaves at least one class for the clusters."""
    size = integer("shortlist", value)
    if not 0 <= size < num_classes:
        raise ValueError(
            f"shortlist must be from 0 to num_classes − 1 = {num_classes - 1}, got {size}; with "
            "all classes in the shortlist there is nothing to cluster: use an ordinary softmax"
        )
    return size


def number_of_clusters(value: Any, left: int) -> int:
    """Returns a number of clusters for the classes outside the shortlist."""
    size = at_least_one("num_clusters", value)
    if size > left:
        raise ValueError(
            f"num_clusters must be at most {left}, the number of classes outside the shortlist, "
            f"got {size}; take fewer clusters or a smaller shortlist"
        )
    return size


def class_vectors(value: Any, num_classes: int) -> Tensor:
    """Returns vectors (D, n) in float32 on the CPU."""
    floating("vectors", value)
    if value.dim() != 2 or len(value) != num_classes or value.shape[1] == 0:
        raise ValueError(
            f"vectors must have shape (num_classes = {num_classes}, n), one row per entry of "
            f"counts, got {tuple(value.shape)}"
        )
    # A copy, since the vectors may be a weight in training.
    vectors: Tensor = value.detach().to("cpu", torch.float32, copy=True)
    wrong = ~vectors.isfinite().all(1)
    if bool(wrong.any()):
        raise ValueError(
            "vectors must be finite in float32 for every class, "
            f"got {vectors[wrong][0].tolist()!s:.60} for class {int(wrong.nonzero()[0])}; "
            "give a class without a vector a row of zeros"
        )
    return vectors


def tokens(value: Any, num_classes: int) -> Tensor:
    """Returns class indices (N), or pairs (N, 2) of a class and a context, as int64 on the CPU."""
    if not is_integer(value):
        came = value.dtype if isinstance(value, Tensor) else shown(value)
        raise TypeError(f"tokens must be a tensor of class indices (torch.int64), got {came}")
    dense("tokens", value)
    pairs = value.dim() == 2 and value.shape[1] == 2
    if not (value.dim() == 1 or pairs) or len(value) < 2 - pairs:
        raise ValueError(
            "tokens must be class indices of shape (N,) with N ≥ 2, or pairs of a class and a "
            f"context of shape (N, 2) with N ≥ 1, got {tuple(value.shape)}"
        )
    found: Tensor = value.detach().to("cpu", torch.int64)
    classes = found[:, 0] if pairs else found
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"tokens must hold classes in [0, num_classes = {num_classes}), one for each entry of "
            f"counts, got {low if low < 0 else high}; map unknown tokens to a class of their own, "
            "or leave them out by pairs (N, 2)"
        )
    if pairs and int(found[:, 1].min()) < 0:
        raise ValueError(
            "tokens must hold contexts that are not negative in its second column, "
            f"got {int(found[:, 1].min())}; leave out pairs without a context"
        )
    return found


def largest_share(value: Any, least: float, why: str) -> float:
    """Returns a bound of the share of a cluster that can be held whatever the vectors are."""
    finite("largest_share", value)
    share = float(value)
    if not least <= share <= 1:
        raise ValueError(
            f"largest_share must be from {math.ceil(1000 * least) / 1000:g}, {why}, to 1, got "
            f"{share:g}; take a larger largest_share, fewer clusters or a larger shortlist"
        )
    return share


def least_count(value: Any) -> float:
    """Returns the count below which a class is rare, zero or positive."""
    non_negative("min_count", value)
    return number("min_count", value)


def seed(value: Any) -> int:
    """Returns a seed that both PyTorch and scikit-learn take."""
    number = integer("seed", value)
    if not 0 <= number < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 − 1, got {number}")
    return number


def assignment(value: Any, num_classes: int | None = None) -> Tensor:
    """Returns the cluster of each class, or −1 for the shortlist, as int64 on the CPU.

    num_classes: D; None for any number.
    """
    if not is_integer(value):
        came = value.dtype if isinstance(value, Tensor) else shown(value)
        mend = "; pass its attribute assignment" if hasattr(value, "assignment") else ""
        raise TypeError(
            f"assignment must be a tensor of cluster indices (torch.int64), got {came}{mend}"
        )
    dense("assignment", value)
    size = "num_classes" if num_classes is None else str(num_classes)
    if value.dim() != 1 or len(value) == 0 or len(value) != (num_classes or len(value)):
        raise ValueError(
            f"assignment must have shape ({size},), the cluster of each class or −1 for the "
            f"shortlist, got {tuple(value.shape)}"
        )
    if value.is_meta:
        raise ValueError("assignment must have values, got a tensor on the meta device")
    found: Tensor = value.detach().to("cpu", torch.int64, copy=True)
    low, high = int(found.min()), int(found.max())
    if low < -1:
        raise ValueError(
            f"assignment must hold clusters 0, 1, …, or −1 for the shortlist, got {low}"
        )
    if high >= len(found):
        raise ValueError(
            f"assignment must number the clusters from 0, below the number of classes {len(found)}"
            f", got {high}; number them anew by torch.unique(…, return_inverse=True)"
        )
    return found
