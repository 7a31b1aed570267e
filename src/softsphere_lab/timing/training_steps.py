"""Training steps of output layers: forward, backward and update, on hidden rows and targets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere import (
    ClusteredLoss,
    FactoredSphericalLoss,
    LinearSphericalLoss,
    LinearSphericalOptions,
    SampledSoftmaxLoss,
)
from softsphere.matrix.step import THIN
from softsphere.optim import FactoredSGD
from softsphere_lab.models.baselines import AdaptiveSoftmax, HierarchicalSoftmax
from softsphere_lab.timing.setting import Setting
from softsphere_lab.timing.steps import Repeated, Step

__all__ = [
    "CHUNKED",
    "CLUSTERED",
    "CLUSTERS",
    "COMPILED",
    "CORE",
    "FACTORED",
    "FACTORED_LEAVES",
    "GRAM",
    "LAYERS",
    "LOSS",
    "RATE",
    "REPEATED",
    "SHARE",
    "Softmax",
    "clustered",
    "factored",
    "memory",
    "obstacle",
    "products",
    "rate_of",
    "repeated",
]

RATE = 0.01
LOSS = "taylor_softmax"
FACTORED = "factored Taylor (ours)"
COMPILED = "factored Taylor, compiled (ours)"
GRAM = "linear Taylor, gram (ours)"
CLUSTERED = "clustered Taylor (ours)"
FACTORED_LEAVES = "clustered Taylor, factored (ours)"
CORE = "softmax, core fused"
# The share of the machine's memory that a layer may take.
SHARE = 0.8


def _sgd(head: nn.Module, lr: float = RATE) -> Step:
    return Step(head, torch.optim.SGD(head.parameters(), lr=lr))


def rate_of(setting: Setting, loss: str) -> float:
    """A rate at which training is stable: that of a loss with probabilities scales like D."""
    return 1e-3 * setting.D if loss == LOSS else RATE


def factored(setting: Setting, loss: str = LOSS) -> Step:
    head = FactoredSphericalLoss(setting.d, setting.D, loss, bias=False)
    return Step(head, FactoredSGD(head.parameters(), lr=rate_of(setting, loss)))


def repeated(setting: Setting, *, compile: bool = False) -> Repeated:
    """The same step, which a GPU captures; compile: and which a CPU compiles."""
    head = FactoredSphericalLoss(setting.d, setting.D, LOSS, bias=False)
    rate = torch.tensor(rate_of(setting, LOSS), dtype=torch.float64)
    optimizer = FactoredSGD(head.parameters(), lr=rate, capturable=True)
    return Repeated(Step(head, optimizer), setting, compile=compile)


def _gram(setting: Setting) -> Step:
    """The same training as by `factored`, on a dense weight with a dense gradient."""
    options = LinearSphericalOptions(engine="gram")
    head = LinearSphericalLoss(setting.d, setting.D, LOSS, bias=False, options=options)
    return _sgd(head, rate_of(setting, LOSS))


class Softmax(nn.Module):
    """`F.linear` and `F.cross_entropy`, in the dtype of the weight."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        bound = 1 / math.sqrt(setting.d)
        self.weight = nn.Parameter(torch.empty(setting.D, setting.d).uniform_(-bound, bound))

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        # the rows are in float32 also where the weight is in bfloat16
        return F.cross_entropy(F.linear(hidden.to(self.weight.dtype), self.weight), target)


class CoreSoftmax(Softmax):
    """PyTorch's fused softmax without logits. chunk: the rows that it takes at a time."""

    def __init__(self, setting: Setting, chunk: int) -> None:
        super().__init__(setting)
        self.options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, self.weight, target, options=self.options)


def _softmax(setting: Setting) -> Step:
    return _sgd(Softmax(setting))


def _core(setting: Setting, chunk: int = 128) -> Step:
    return _sgd(CoreSoftmax(setting, chunk))


def _adaptive(setting: Setting) -> Step:
    return _sgd(AdaptiveSoftmax(setting.d, setting.D, bias=False))


def _sampled(setting: Setting) -> Step:
    return _sgd(SampledSoftmaxLoss(setting.d, setting.D, num_samples=1024, bias=False, sparse=True))


def clustered(
    setting: Setting,
    leaf: str = LOSS,
    *,
    sparse: bool = True,
    engine: str = "auto",
    bias: bool = True,
) -> Step:
    """A shortlist of 2,000 classes, and clusters of equal sizes and nearly equal frequencies.

    bias: the other layers that are timed have none.
    """
    shortlist = min(2_000, setting.D // 2)
    number = 256 if setting.D < 500_000 else 1_024
    assignment = (torch.arange(setting.D) - shortlist) % min(number, setting.D - shortlist)
    assignment[:shortlist] = -1
    counts = 1 / torch.arange(1, setting.D + 1, dtype=torch.float64)
    options: dict[str, Any] = {"leaf": leaf, "counts": counts, "sparse": sparse, "engine": engine}
    options["bias"] = bias
    return _sgd(ClusteredLoss(setting.d, setting.D, assignment, **options))


def _adaptive_of_wikipedia(setting: Setting) -> Step:
    """With the cutoffs 2,000, 10,000 and 40,000, as far as there are so many classes."""
    cutoffs = [cut for cut in (2_000, 10_000, 40_000) if cut < setting.D]
    return _sgd(AdaptiveSoftmax(setting.d, setting.D, cutoffs=cutoffs or [1], bias=False))


def _hierarchical(setting: Setting) -> Step:
    return _sgd(HierarchicalSoftmax(setting.d, setting.D, bias=False, sparse=True))


LAYERS: Mapping[str, Callable[[Setting], Step]] = {
    FACTORED: factored,
    GRAM: _gram,
    "softmax": _softmax,
    CORE: _core,
    "adaptive softmax": _adaptive,
    "sampled softmax, 1024": _sampled,
    "hierarchical softmax": _hierarchical,
}
# By the factored layer as well, in fewer and longer operations.
REPEATED: Mapping[str, Callable[[Setting], Repeated]] = {COMPILED: partial(repeated, compile=True)}
# Those among which the best chunk of PyTorch's fused softmax is looked for.
CHUNKED: Mapping[str, Callable[[Setting], Step]] = {
    f"{CORE}, chunk {chunk}": partial(_core, chunk=chunk) for chunk in (25, 50, 100, 200)
}

# Clustered layers, and the adaptive softmax that they are compared with besides those above.
CLUSTERS: Mapping[str, Callable[[Setting], Step]] = {
    CLUSTERED: clustered,
    "clustered softmax (ours)": partial(clustered, leaf="softmax"),
    FACTORED_LEAVES: partial(clustered, sparse=False, engine="factored"),
    "clustered Taylor, dense gradient (ours)": partial(clustered, sparse=False),
    "clustered Taylor, without bias (ours)": partial(clustered, bias=False),
    "adaptive softmax, cutoffs 2000, 10000, 40000": _adaptive_of_wikipedia,
}


def products(
    setting: Setting, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor, Tensor], None]:
    """The matrix products that a step of the factored layer cannot do without.

    Those are seven of m d² (H Q, V_t U, U Lᵀ, (U Lᵀ) R, R U⁻¹, Lᵀ N, Rᵀ Z) and four of m² d, or for
    many rows, whose gradient is taken as a map of d × d, six of m d² and five of d³.
    """
    Q = torch.randn(setting.d, setting.d, dtype=dtype)
    thin = setting.m <= THIN * setting.d
    K = torch.randn(setting.m, setting.m, dtype=dtype) if thin else Q

    def multiply(hidden: Tensor, _: Tensor) -> None:
        H = hidden.to(dtype)
        if not thin:
            H @ Q, H @ Q, H @ Q, H.T @ H, H.T @ H, H.T @ H
            Q @ Q, Q @ Q, Q @ Q, Q @ Q, Q @ Q
            return
        H @ Q, H @ Q, Q @ H.T, H @ Q
        H.T @ H, H.T @ H, H.T @ H
        H @ H.T, H @ H.T, K @ H, K @ H

    return multiply


def _least_bytes(name: str, setting: Setting) -> int:
    """The bytes of W, and where a layer makes them of its dense gradient and its logits."""
    W, logits = 4 * setting.D * setting.d, 4 * setting.D * setting.m
    gradients = {GRAM: W, "softmax": W + 2 * logits, CORE: W + 2 * logits}
    return W + gradients.get(name, 0)


def memory() -> int:
    """Returns the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def obstacle(name: str, setting: Setting) -> str | None:
    """Says why a layer cannot be timed with this torch on this machine; None if it can."""
    if name == CORE and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy, which 2.13 brought"
    room = SHARE * memory()
    least = _least_bytes(name, setting)
    if least > room:
        return f"it takes {least / 1e9:.3g} GB, and may take {room / 1e9:.3g} GB here"
    return None
