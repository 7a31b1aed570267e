"""Output layers with very many classes, and the spherical family of losses.

Criteria on logits, in place of `nn.CrossEntropyLoss`: `TaylorSoftmaxLoss`, `SphericalSoftmaxLoss`,
`SoftMarginSoftmaxLoss`, and `SphericalLoss` for every other loss by its name.

Output layers, which take hidden states and targets and return the loss: `LinearSphericalLoss`
without logits for any optimizer, `FactoredSphericalLoss` whose step does not depend on the number
of classes, `ClusteredLoss` near softmax in quality, and `SampledSoftmaxLoss` to compare with.
`optim.FactoredSGD` steps factored weights, `clusters` makes clusters, `engines` chooses how outputs
are computed, `matrix` has the factored weight, `parallel` helps a model around a layer with a
process_group, and `CapturedStep` makes a CUDA graph of a training step.

>>> import torch
>>> head = LinearSphericalLoss(8, 1000, "taylor_softmax")
>>> head(torch.randn(4, 8), torch.randint(1000, (4,))).backward()
"""

from softsphere import clusters, engines, functional, losses, matrix, optim, parallel
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
    "engines",
    "functional",
    "losses",
    "matrix",
    "optim",
    "parallel",
]
