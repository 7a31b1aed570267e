"""The error of gradients, from sampled rows of the same gradients in float64.

A row of the gradient by the weight needs the normalisers of all hidden rows, and those need all
classes. This is one product of m × d and d × D in float64, made in chunks of hidden rows: at most
3.4e13 FLOPs for a head of a language model, which a GPU for data centres does in a second.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["gradient_errors"]

# How many rows of each gradient are compared; of that by the weight so many that are targets, and
# as many that are not.
SAMPLED = 64
# Entries of the logits of a chunk, of which a loss keeps a few copies of 8 bytes each.
ENTRIES = 2**26


def gradient_errors(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, target: Tensor
) -> tuple[float, float]:
    """Returns the relative errors of `hidden.grad` and of `weight.grad`.

    Rows of the weight that are targets have gradients much larger than others, so the error of the
    others is taken by itself, and the larger of the two is returned.

    loss: the mean loss of logits and targets.
    """
    assert hidden.grad is not None and weight.grad is not None
    kinds = [rows for rows in _sampled(target, len(weight)) if len(rows)]
    by_hidden, by_weight = _exact(loss, hidden, weight, target, torch.cat(kinds))
    exact = by_weight.split([len(rows) for rows in kinds])
    errors = [
        _error(weight.grad[rows], of_kind) for rows, of_kind in zip(kinds, exact, strict=True)
    ]
    # Python's max may pass over a NaN
    return _error(hidden.grad[: len(by_hidden)], by_hidden), float(torch.tensor(errors).max())


def _sampled(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Classes that are targets, and classes that are not: the same whatever was drawn before."""
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(0)).to(target.device)
    is_target = torch.isin(order, target)
    return order[is_target][:SAMPLED], order[~is_target][:SAMPLED]


def _exact(
    loss: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    classes: Tensor,
) -> tuple[Tensor, Tensor]:
    """In float64, the gradients by the first hidden rows, and by these rows of the weight."""
    W, m = weight.detach().double(), len(hidden)
    by_hidden = W.new_empty(0, W.shape[1])
    by_weight = W.new_zeros(len(classes), W.shape[1])
    rows = max(SAMPLED, ENTRIES // len(W))
    for h, t in zip(hidden.detach().split(rows), target.split(rows), strict=True):
        H = h.double()
        logits = (H @ W.mT).requires_grad_()
        (g,) = torch.autograd.grad(loss(logits, t), logits)
        g *= len(h) / m
        if not len(by_hidden):
            by_hidden = g[:SAMPLED] @ W
        by_weight += g[:, classes].mT @ H
    return by_hidden, by_weight


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())
