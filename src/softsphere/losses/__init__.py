"""The losses as values, and a registry of their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from softsphere.losses.base import Loss, Normalised, OnLogits, Spherical
from softsphere.losses.bohning_bound import BohningBound
from softsphere.losses.bouchard_bound import BouchardBound
from softsphere.losses.softmax import HigherTaylorSoftmax, SoftMarginSoftmax, Softmax
from softsphere.losses.spherical_softmax import SphericalSoftmax
from softsphere.losses.squared_error import SquaredError
from softsphere.losses.taylor_softmax import TaylorSoftmax
from softsphere.losses.z_loss import ZLoss

__all__ = [
    "REGISTRY",
    "BohningBound",
    "BouchardBound",
    "HigherTaylorSoftmax",
    "Loss",
    "Normalised",
    "OnLogits",
    "SoftMarginSoftmax",
    "Softmax",
    "Spherical",
    "SphericalSoftmax",
    "SquaredError",
    "TaylorSoftmax",
    "ZLoss",
    "get",
    "names",
]

# The names that users write. A new loss is a file and a line here.
REGISTRY: dict[str, type[Loss]] = {
    "squared_error": SquaredError,
    "spherical_softmax": SphericalSoftmax,
    "taylor_softmax": TaylorSoftmax,
    "z_loss": ZLoss,
    "bouchard_bound": BouchardBound,
    "bohning_bound": BohningBound,
    "softmax": Softmax,
    "higher_taylor_softmax": HigherTaylorSoftmax,
    "soft_margin_softmax": SoftMarginSoftmax,
}


def names(kind: type[Loss] = Loss) -> list[str]:
    """Returns the names of the losses of a kind.

    >>> names(Normalised)
    ['spherical_softmax', 'taylor_softmax']
    """
    return [name for name, value in REGISTRY.items() if issubclass(value, kind)]


def get(loss: str | Loss, kind: type[Loss] = Loss) -> Loss:
    """Returns the loss of that name with its default hyper-parameters, or the given loss itself.

    Args:
        loss: a name of `REGISTRY`, or a loss.
        kind: of which the error for an unknown name lists the names.

    Raises ValueError for an unknown name, with a list of the known ones, and TypeError for
    anything that is neither a name nor a loss.

    >>> get("spherical_softmax")
    SphericalSoftmax(eps=1.0)
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(
            f"loss must be a name or a softsphere.losses.Loss, got {loss!r}{_instead(loss)}"
        )
    if loss not in REGISTRY:
        known = ", ".join(names(kind))
        raise ValueError(f"loss must be one of {known}, got {loss!r}{_instead(loss)}")
    return REGISTRY[loss]()


def _instead(given: Any) -> str:
    """What stands for something that is no loss of this package, if anything does."""
    if isinstance(given, nn.CrossEntropyLoss) or given == "cross_entropy":
        return '; the loss of nn.CrossEntropyLoss is "softmax"'
    if isinstance(given, type) and issubclass(given, Loss):
        return f"; give a value of that type, {given.__name__}()"
    if isinstance(getattr(given, "loss", None), Loss):
        return "; give the attribute loss of that module"
    return ""
