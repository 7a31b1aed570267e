"""A dense twin of the factored layer: explicit losses, autograd and torch's SGD, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere import losses


def every_class(kind: losses.Loss, o: Tensor, pi: Tensor) -> Tensor:
    """ℓ of every class taken as the target: (m, D), from all the outputs o (m, D)."""
    mass = pi.sum()
    if isinstance(kind, losses.SquaredError):
        onehot = torch.eye(len(pi)).double()
        weight = onehot + kind.unobserved * (1 - onehot)
        return (pi * weight * (o.unsqueeze(1) - onehot) ** 2).sum(-1)
    if isinstance(kind, losses.TaylorSoftmax):
        f = pi * (1 + o + o**2 / 2)
        return -(f / f.sum(1, keepdim=True)).log()
    if isinstance(kind, losses.SphericalSoftmax):
        f = pi * (o**2 + kind.eps)
        return -(f / f.sum(1, keepdim=True)).log()
    mu = ((pi * o).sum(1) / mass).unsqueeze(1)
    spread = (pi * (o - mu) ** 2).sum(1, keepdim=True)
    if isinstance(kind, losses.ZLoss):
        z = (o - mu) / (spread / mass).sqrt()
        return torch.log(1 + torch.exp(kind.a * (kind.b - z))) / kind.a
    if isinstance(kind, losses.BohningBound):
        return mass.log() + mu + spread / 4 - o - pi.log()
    if isinstance(kind, losses.BouchardBound):
        xi = best_xi(o.detach(), pi)
        lam = torch.tanh(xi / 2) / (4 * xi)
        alpha = ((o @ pi).unsqueeze(1) * 2 * lam + mass / 2 - 1) / (2 * lam * mass)
        inside = lam * ((o - alpha) ** 2 - xi**2) + (o - alpha - xi) / 2 + torch.log1p(xi.exp())
        return alpha + (inside @ pi).unsqueeze(1) - o - pi.log()
    raise KeyError(kind)


def best_xi(o: Tensor, pi: Tensor) -> Tensor:
    """For each row of o (m, D), the ξ (m, 1) where the derivative of Bouchard's bound is zero."""
    mass = pi.sum()
    mu = (o @ pi / mass).unsqueeze(1)
    var = ((o - mu) ** 2 @ pi / mass).unsqueeze(1)
    low, high = torch.full_like(var, 1e-9), torch.full_like(var, 1e4)
    for _ in range(80):
        xi = (low + high) / 2
        lam = torch.tanh(xi / 2) / (4 * xi)
        below = xi**2 < var + ((mass - 2) / (4 * mass * lam)) ** 2
        low, high = torch.where(below, xi, low), torch.where(below, high, xi)
    return (low + high) / 2


class DenseTwin:
    """diag(√π) [W b] as one dense float64 parameter under torch.optim.SGD."""

    def __init__(self, weight: Tensor, bias: Tensor | None, pi: Tensor | None, **sgd) -> None:
        W = weight.double()
        if bias is not None:
            W = torch.cat([W, bias.double().unsqueeze(1)], 1)
        self.has_bias = bias is not None
        self.pi = torch.ones(len(W)).double() if pi is None else pi.double()
        self.root = self.pi.sqrt().unsqueeze(1)
        self.parameter = torch.nn.Parameter(self.root * W)
        self.sgd = torch.optim.SGD([self.parameter], **sgd)

    @property
    def W(self) -> Tensor:
        return self.parameter / self.root

    def outputs(self, hidden: Tensor) -> Tensor:
        H = hidden.double()
        if self.has_bias:
            H = torch.cat([H, torch.ones_like(H[:, :1])], 1)
        return H @ self.W.T

    def loss(self, kind: losses.Loss, hidden: Tensor, target, values=None) -> Tensor:
        """Losses of rows (m): target (m) with -100, or (m, K) with values and −1 as padding."""
        o = self.outputs(hidden)
        if values is None:
            ignored = target == -100
            each = every_class(kind, o, self.pi)
            own = each.gather(1, target.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
            return own.masked_fill(ignored, 0)
        vector = torch.zeros_like(o)
        real = target >= 0
        for i in range(len(o)):
            for t, y in zip(target[i][real[i]].tolist(), values[i][real[i]].tolist(), strict=True):
                vector[i, t] += y
        if isinstance(kind, losses.SquaredError):
            weight = torch.ones_like(vector).masked_fill(vector == 0, kind.unobserved)
            return (weight * (o - vector) ** 2) @ self.pi
        return (vector * every_class(kind, o, self.pi)).sum(1)
