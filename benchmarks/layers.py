"""Output layers to be timed: each makes a step that trains on (hidden, target) and is whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softsphere import FactoredSphericalLoss
from softsphere.optim import FactoredSGD

Step = Callable[[Tensor, Tensor], None]
RATE = 0.01


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


def factored(setting: Setting, loss: str = "taylor_softmax") -> Step:
    head = FactoredSphericalLoss(setting.d, setting.D, loss, bias=False)
    optimizer = FactoredSGD([head], lr=1e-3 * setting.D if loss == "taylor_softmax" else RATE)

    def step(hidden: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        head(hidden, target).backward()
        optimizer.step()

    step.head = head  # type: ignore[attr-defined]
    return step


def weight(setting: Setting) -> nn.Parameter:
    bound = 1 / math.sqrt(setting.d)
    return nn.Parameter(torch.empty(setting.D, setting.d).uniform_(-bound, bound))


def softmax(setting: Setting) -> Step:
    """F.linear, F.cross_entropy, autograd and SGD."""
    W = weight(setting)
    optimizer = torch.optim.SGD([W], lr=RATE)

    def step(hidden: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(F.linear(hidden, W), target).backward()
        optimizer.step()

    return step


def core(setting: Setting, chunk: int) -> Step:
    """PyTorch's fused softmax without logits, with a chunk of rows set by hand."""
    W = weight(setting)
    optimizer = torch.optim.SGD([W], lr=RATE)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def step(hidden: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        F.linear_cross_entropy(hidden, W, target, options=options).backward()
        optimizer.step()

    return step


def adaptive(setting: Setting) -> Step:
    """nn.AdaptiveLogSoftmaxWithLoss, its clusters ten times larger each."""
    cutoffs = [c for c in (2_000, 20_000, 200_000, 2_000_000) if c < setting.D]
    layer = nn.AdaptiveLogSoftmaxWithLoss(setting.d, setting.D, cutoffs)
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)

    def step(hidden: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        layer(hidden, target).loss.backward()
        optimizer.step()

    return step


def sampled(setting: Setting, negatives: int = 1024) -> Step:
    """Sampled softmax with log-uniform negatives shared by the batch; sparse gradients."""
    W = nn.Embedding.from_pretrained(weight(setting).data, freeze=False, sparse=True)
    optimizer = torch.optim.SGD(W.parameters(), lr=RATE)
    log_D = math.log(setting.D + 1)

    def log_chance(classes: Tensor) -> Tensor:
        return torch.log(negatives * torch.log1p(1 / (classes + 1)) / log_D)

    def step(hidden: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        drawn = (torch.exp(torch.rand(negatives) * log_D).long() - 1).clamp_(0, setting.D - 1)
        rows = W(torch.cat([target, drawn]))
        own, others = rows[: len(target)], rows[len(target) :]
        hit = drawn == target.unsqueeze(1)
        o = (hidden @ others.T - log_chance(drawn)).masked_fill(hit, -torch.inf)
        first = ((hidden * own).sum(1) - log_chance(target)).unsqueeze(1)
        F.cross_entropy(torch.cat([first, o], 1), torch.zeros_like(target)).backward()
        optimizer.step()

    return step


def hierarchical(setting: Setting) -> Step:
    """Two-level softmax: √D clusters, then √D classes in the target's; sparse gradients."""
    size = math.ceil(math.sqrt(setting.D))
    top = nn.Linear(setting.d, size)
    leaves = nn.Embedding(size, size * setting.d, sparse=True)
    nn.init.uniform_(leaves.weight, -1 / math.sqrt(setting.d), 1 / math.sqrt(setting.d))
    optimizer = torch.optim.SGD([*top.parameters(), *leaves.parameters()], lr=RATE)

    def step(hidden: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        cluster, leaf = target % size, target // size
        block = leaves(cluster).view(-1, size, setting.d)
        inner = torch.bmm(block, hidden.unsqueeze(2)).squeeze(2)
        loss = F.cross_entropy(top(hidden), cluster) + F.cross_entropy(inner, leaf)
        loss.backward()
        optimizer.step()

    return step


LAYERS: dict[str, Callable[[Setting], Step]] = {
    "factored Taylor (ours)": factored,
    "softmax": softmax,
    "softmax, core fused": lambda setting: core(setting, 128),
    "adaptive softmax": adaptive,
    "sampled softmax, 1024": sampled,
    "hierarchical softmax": hierarchical,
}
