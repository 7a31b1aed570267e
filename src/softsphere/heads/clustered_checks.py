"""Checks of what a caller passes to a clustered layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from softsphere import checks, losses
from softsphere._torch import mapped_by_vmap, values_on_cpu
from softsphere.engines.grouping import Grouping
from softsphere.engines.leaf_choice import LEAF_ENGINES

__all__ = [
    "check_can_be_written",
    "check_engine",
    "check_layer_above",
    "check_prior",
    "distribution",
    "refuse_mapped_targets",
    "refuse_other_targets",
]


def distribution(leaf: Any) -> losses.Loss:
    """Returns the loss if it is a distribution."""
    known = ", ".join(name for name, kind in losses.REGISTRY.items() if kind.normalised)
    if isinstance(leaf, str) and leaf not in losses.REGISTRY:
        raise ValueError(f"leaf must be one of {known}, got {leaf!r}")
    if not isinstance(leaf, str | losses.Loss):
        made = f"{leaf.__name__}()" if isinstance(leaf, type) else f"one of {known}"
        raise TypeError(
            f"leaf must be a name or a softsphere.losses.Loss, got {leaf!r}; use {made}"
        )
    loss = losses.get(leaf)
    if not loss.normalised:
        raise TypeError(
            f"leaf must be a loss that is a distribution, got {loss}; use one of {known}"
        )
    kind = type(loss)
    if isinstance(loss, losses.OnLogits) and kind not in losses.REGISTRY.values():
        raise TypeError(
            f"leaf must be one of {known}, or a spherical loss of your own "
            f"(softsphere.losses.Normalised), got a {kind.__name__}, whose per_class the leaves "
            "would not compute; use LinearSphericalLoss for it"
        )
    return loss


def check_prior(pi: Any, grouping: Grouping) -> None:
    """Raises ValueError for a base measure of the leaves that is not one, on a CPU.

    A buffer can be changed in place, assigned, or replaced by torch.func.functional_call.
    """
    mend = "pass the counts to the constructor, which normalises them"
    if not isinstance(pi, Tensor):
        raise ValueError(f"the buffer prior must be a tensor, got {pi!r}; {mend}")
    if len(pi) != len(grouping.leaves):
        raise ValueError(
            f"prior must have {len(grouping.leaves)} rows, one for each class in a cluster, got "
            f"{tuple(pi.shape)}; make a new layer for other classes"
        )
    if not values_on_cpu(pi) or not len(pi):
        return
    if not bool((pi > 0).all()):
        raise ValueError(f"the buffer prior must be positive, got {float(pi.min()):g}; {mend}")
    error = grouping.error_of_measure(pi)
    if not error <= 1e-5:
        raise ValueError(
            "the buffer prior must sum to the number of classes in every cluster, and is off by a "
            f"factor of up to {1 + error:g}; {mend}"
        )


def check_layer_above(name: str, layer: Any, width: int, outputs: int, what: str) -> None:
    """Raises ValueError unless root or project takes rows of a width to a number of outputs.

    what: one output is for each of these.
    """
    W = getattr(layer, "weight", None)
    if not isinstance(W, Tensor) or W.dim() != 2:
        kind = type(layer)
        raise ValueError(
            f"{name} must be a linear layer whose weight is a tensor (outputs, features), got "
            f"{kind.__module__}.{kind.__qualname__}; use hooks or a parametrization of that layer "
            "instead, and leave the output layer out where layers are quantised"
        )
    if len(W) != outputs:
        raise ValueError(
            f"{name}.weight must have {outputs} rows, one for each {what}, got {tuple(W.shape)}; "
            "make a new layer for others"
        )
    if W.shape[1] != width:
        raise ValueError(
            f"{name}.weight must have {width} columns, as hidden states have, got "
            f"{tuple(W.shape)}; make a new layer for another width"
        )


def check_engine(loss: losses.Loss, engine: str, sparse: bool) -> None:
    """Raises TypeError or ValueError for an engine that cannot compute the leaves."""
    checks.one_of("engine", engine, ("auto", *LEAF_ENGINES))
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


def check_can_be_written(layer: nn.Module, name: str) -> None:
    """Raises TypeError for a weight whose values are computed from others."""
    if "weight" not in layer._parameters:
        raise TypeError(
            f"{name} is computed from other parameters (a parametrization, or pruning), so that "
            "what is written into it would be lost; write it before, or after these are removed"
        )


def refuse_other_targets(target_values: Any, mask: Any) -> None:
    """Raises TypeError for K-sparse targets and for a mask."""
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


def refuse_mapped_targets(target: Tensor) -> None:
    """Raises RuntimeError if torch.func.vmap maps over the targets."""
    if mapped_by_vmap(target):
        raise RuntimeError(
            "torch.func.vmap cannot map over the target of a ClusteredLoss, which sorts its rows "
            "by the clusters of their targets; give it all rows in one call, with "
            'reduction="none" for a loss of each, whose torch.func.jacrev has a gradient of each'
        )
