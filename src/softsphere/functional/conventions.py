"""What rows count for, how they are reduced, and in which dtype: as in `F.cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere.targets import from_indices

__all__ = [
    "REDUCTIONS",
    "check_options",
    "counts",
    "finish",
    "mixed_precision",
    "reduce",
    "refuse_weight",
]

REDUCTIONS = ("mean", "sum", "none")


def check_options(
    loss: losses.Loss, reduction: str, ignore_index: int, label_smoothing: float
) -> None:
    """Options that mean the same for every form of a loss."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.index("ignore_index", ignore_index)
    checks.label_smoothing(label_smoothing)
    if label_smoothing and not loss.smoothable:
        raise ValueError(
            f"label_smoothing has no meaning for {type(loss).__name__}, which is no distribution "
            "over classes; leave it 0"
        )


def counts(
    target: Tensor, num_classes: int, ignore_index: int, w: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of class indices (...): those to look up, class weights there, which rows are ignored, and
    what each counts for in the mean."""
    entries = from_indices(target, num_classes, ignore_index)
    t, ignored = entries.t.squeeze(-1), entries.ignored
    # gather, since indexing with a single index looks at its value, which fails inside vmap
    flat = t.reshape(-1)
    own = torch.ones_like(t, dtype=dtype) if w is None else w.gather(0, flat).view(t.shape)
    return t, own, ignored, torch.where(ignored, 0.0, own)


def reduce(rows: Tensor, counted: Tensor | None, reduction: str) -> Tensor:
    """rows reduced; `counted` is what each counts for in the mean (None: one)."""
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.mean() if counted is None else rows.sum() / counted.sum()


def finish(rows: Tensor, counted: Tensor | None, reduction: str, given: Tensor) -> Tensor:
    """rows reduced, in the dtype of what was given; under autocast in their own."""
    result = reduce(rows, counted, reduction)
    return result if mixed_precision(given) else result.to(given.dtype)


def mixed_precision(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    device = x.device.type
    # the compiler of torch 2.11 cannot trace the first question, and compiles for no other device
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def refuse_weight(w: Tensor | None) -> None:
    if w is not None:
        raise ValueError(
            "weight has no meaning for the squared error of a target vector; "
            "weigh its classes with prior"
        )
