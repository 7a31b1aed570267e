"""Output layers to be timed: each makes a step that trains on (hidden, target) and is whole."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere import FactoredSphericalLoss, LinearSphericalLoss, LinearSphericalOptions
from softsphere.optim import FactoredSGD
from softsphere_lab.models.baselines import AdaptiveSoftmax, HierarchicalSoftmax

__all__ = ["CORE", "FACTORED", "LAYERS", "Setting", "Step", "core", "factored", "obstacle"]

RATE = 0.01
FACTORED = "factored Taylor (ours)"
GRAM = "linear Taylor, gram (ours)"
CORE = "softmax, core fused"
# The share of the machine's memory that a layer may have.
SHARE = 0.8


@dataclass(frozen=True)
class Setting:
    """D classes, width d, m rows."""

    D: int
    d: int
    m: int

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hidden rows and targets that are distributed as words are, P(t < k) ~ log k."""
        hidden = torch.randn(self.m, self.d, generator=generator).requires_grad_()
        uniform = torch.rand(self.m, generator=generator)
        target = (torch.exp(uniform * math.log(self.D + 1)).long() - 1).clamp_(0, self.D - 1)
        return hidden, target


@dataclass(frozen=True)
class Step:
    """Forward, backward and update of an output layer; gives the loss before the update."""

    head: nn.Module
    optimizer: torch.optim.Optimizer

    def __call__(self, hidden: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.head(hidden, target)
        loss.backward()
        self.optimizer.step()
        return loss


def sgd(head: nn.Module, lr: float = RATE) -> Step:
    return Step(head, torch.optim.SGD(head.parameters(), lr=lr))


def rate(setting: Setting, loss: str) -> float:
    return 1e-3 * setting.D if loss == "taylor_softmax" else RATE


def factored(setting: Setting, loss: str = "taylor_softmax") -> Step:
    head = FactoredSphericalLoss(setting.d, setting.D, loss, bias=False)
    return Step(head, FactoredSGD(head.parameters(), lr=rate(setting, loss)))


def gram(setting: Setting, loss: str = "taylor_softmax") -> Step:
    """The same training as by `factored`, on a dense weight with a dense gradient."""
    options = LinearSphericalOptions(engine="gram")
    head = LinearSphericalLoss(setting.d, setting.D, loss, bias=False, options=options)
    return sgd(head, rate(setting, loss))


class Softmax(nn.Module):
    """F.linear and F.cross_entropy."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        bound = 1 / math.sqrt(setting.d)
        self.weight = nn.Parameter(torch.empty(setting.D, setting.d).uniform_(-bound, bound))

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, self.weight), target)


class CoreSoftmax(Softmax):
    """PyTorch's fused softmax without logits, with a chunk of rows set by hand."""

    def __init__(self, setting: Setting, chunk: int) -> None:
        super().__init__(setting)
        self.options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, self.weight, target, options=self.options)


class SampledSoftmax(Softmax):
    """Softmax over the target and log-uniform negatives shared by the batch; sparse gradients."""

    def __init__(self, setting: Setting, negatives: int) -> None:
        super().__init__(setting)
        self.negatives = negatives
        self.log_D = math.log(setting.D + 1)

    def log_chance(self, classes: Tensor) -> Tensor:
        return torch.log(self.negatives * torch.log1p(1 / (classes + 1)) / self.log_D)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        drawn = torch.exp(torch.rand(self.negatives) * self.log_D).long() - 1
        drawn = drawn.clamp_(0, len(self.weight) - 1)
        rows = F.embedding(torch.cat([target, drawn]), self.weight, sparse=True)
        own, others = rows[: len(target)], rows[len(target) :]
        hit = drawn == target.unsqueeze(1)
        o = (hidden @ others.T - self.log_chance(drawn)).masked_fill(hit, -torch.inf)
        first = ((hidden * own).sum(1) - self.log_chance(target)).unsqueeze(1)
        return F.cross_entropy(torch.cat([first, o], 1), torch.zeros_like(target))


def softmax(setting: Setting) -> Step:
    return sgd(Softmax(setting))


def core(setting: Setting, chunk: int = 128) -> Step:
    return sgd(CoreSoftmax(setting, chunk))


def adaptive(setting: Setting) -> Step:
    return sgd(AdaptiveSoftmax(setting.d, setting.D, bias=False))


def sampled(setting: Setting, negatives: int = 1024) -> Step:
    return sgd(SampledSoftmax(setting, negatives))


def hierarchical(setting: Setting) -> Step:
    return sgd(HierarchicalSoftmax(setting.d, setting.D, bias=False, sparse=True))


LAYERS: dict[str, Callable[[Setting], Step]] = {
    FACTORED: factored,
    GRAM: gram,
    "softmax": softmax,
    CORE: core,
    "adaptive softmax": adaptive,
    "sampled softmax, 1024": sampled,
    "hierarchical softmax": hierarchical,
}


def least_bytes(name: str, setting: Setting) -> int:
    """What a layer cannot do without: W, and where they are made its dense gradient and logits."""
    W, logits = 4 * setting.D * setting.d, 4 * setting.D * setting.m
    gradients = {GRAM: W, "softmax": W + 2 * logits, CORE: W + 2 * logits}
    return W + gradients.get(name, 0)


def obstacle(name: str, setting: Setting) -> str | None:
    """Why a layer cannot be timed with this torch on this machine; None where it can."""
    if name == CORE and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy, which 2.13 brought"
    room = SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    least = least_bytes(name, setting)
    if least > room:
        return f"it takes {least / 1e9:.0f} GB, of which there are {room / 1e9:.0f}"
    return None
