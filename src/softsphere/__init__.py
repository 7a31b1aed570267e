"""Softmax alternatives of the spherical loss family."""

from softsphere import clusters, functional, losses, optim
from softsphere.captured import CapturedStep
from softsphere.criteria import (
    SoftMarginSoftmaxLoss,
    SphericalLoss,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
)
from softsphere.engines import LinearSphericalOptions
from softsphere.heads import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    SampledSoftmaxLoss,
)

__version__ = "0.1.0"

__all__ = [
    "CapturedStep",
    "ClusteredLoss",
    "FactoredSphericalLoss",
    "LinearSphericalLoss",
    "LinearSphericalOptions",
    "SampledSoftmaxLoss",
    "SoftMarginSoftmaxLoss",
    "SphericalLoss",
    "SphericalSoftmaxLoss",
    "TaylorSoftmaxLoss",
    "clusters",
    "functional",
    "losses",
    "optim",
]
