"""Softmax alternatives of the spherical loss family."""

from softsphere import functional, losses, optim
from softsphere.heads import FactoredSphericalLoss
from softsphere.modules import (
    SoftMarginSoftmaxLoss,
    SphericalLoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
)

__version__ = "0.1.0"

__all__ = [
    "FactoredSphericalLoss",
    "SoftMarginSoftmaxLoss",
    "SphericalLoss",
    "SphericalSoftmaxLoss",
    "TaylorSoftmaxLoss",
    "functional",
    "losses",
    "optim",
]
