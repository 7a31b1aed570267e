"""Hidden rows, a weight and targets as they are after training, for layers that look at values.

A softmax that skips what has no probability is fast where nothing has any. So half of the mass is
the target's, as in a trained model, and some tens of classes that are like it share the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from softsphere_lab.timing.setting import Setting

__all__ = ["trained_batch"]

# Classes that are alike come in groups of so many. They are neighbours, to the advantage of those
# that skip blocks of classes.
ALIKE = 32
# How far the logits of the classes that are like the target are below its own, about.
BELOW = 4.0
# The mean probability of the target, and the number of rows that it is measured on.
PROBABILITY = 0.5
MEASURED = 64


def trained_batch(
    setting: Setting, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden rows (m, d) and a weight (D, d), which require gradients, and targets (m).

    All rows of the weight have length 1: where d is small, rows of a normal distribution differ so
    much in length that a hidden row along its target has a larger product with others.
    """
    D, d, m = setting.D, setting.d, setting.m
    target = torch.randint(D, (m,), device=device)
    # A target needs a logit near log D, and those that are like it have this share of it.
    shared = max(0.0, 1 - BELOW / math.log(D))
    centres = torch.randn(math.ceil(D / ALIKE), d, device=device).mul_(math.sqrt(shared))
    weight = torch.randn(D, d, device=device).mul_(math.sqrt(1 - shared))
    weight += centres.repeat_interleave(ALIKE, 0)[:D]
    weight /= weight.norm(dim=1, keepdim=True)
    hidden = torch.randn(m, d, device=device)
    hidden += _lean(hidden, weight, target) * weight[target]
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, target


def _lean(noise: Tensor, weight: Tensor, target: Tensor) -> float:
    """How far each row must lean to the weight of its target.

    It grows with log D, and with what the noise and chance products add to the other classes, so it
    is found by halving an interval.
    """
    noise, target = noise[:MEASURED], target[:MEASURED]
    by_noise, by_target = noise @ weight.mT, weight[target] @ weight.mT
    low, high = 0.0, 10 * math.log(len(weight))
    for _ in range(16):
        middle = (low + high) / 2
        p = torch.add(by_noise, by_target, alpha=middle).softmax(1)
        reached = float(p.gather(1, target[:, None]).mean()) >= PROBABILITY
        low, high = (low, middle) if reached else (middle, high)
    return high
