"""Checks of what a caller passes to a clustered layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softsphere import losses

__all__ = ["check_engine", "distribution", "refuse_other_targets"]


def distribution(leaf: str | losses.Loss) -> losses.Loss:
    """Returns the loss if it is a distribution."""
    loss = losses.get(leaf)
    if not loss.normalised:
        known = [name for name, kind in losses.REGISTRY.items() if kind.normalised]
        raise TypeError(
            f"leaf must be a loss that is a distribution, got {loss}; use one of {', '.join(known)}"
        )
    return loss


def check_engine(loss: losses.Loss, engine: str, sparse: bool) -> None:
    """Raises TypeError or ValueError for an engine that cannot compute the leaves."""
    if engine in ("auto", "logits"):
        return
    if not isinstance(loss, losses.Normalised):
        raise TypeError(
            f"engine={engine!r} needs a spherical leaf, got leaf={loss}; "
            "use engine='logits' or 'auto'"
        )
    if sparse:
        raise ValueError(
            f"sparse must be False for engine={engine!r}, whose gradient is that of all classes; "
            "use engine='logits' or 'auto'"
        )


def refuse_other_targets(target: Any, target_values: Any, mask: Any) -> None:
    """Raises TypeError for targets that a clustered layer cannot take, and for a mask."""
    if target_values is not None:
        raise TypeError(
            "target_values cannot be used with a ClusteredLoss, which takes one class index for "
            "each row; use LinearSphericalLoss or FactoredSphericalLoss for K-sparse targets"
        )
    if mask is not None:
        raise TypeError(
            "mask cannot be used with a ClusteredLoss; use LinearSphericalLoss, whose forward "
            "takes a mask of classes"
        )
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(
            "target must hold class indices, got class probabilities, which need the logits of all "
            "classes; use LinearSphericalLoss for them"
        )
