"""SGD with momentum for factored weights, and the optimizer of a whole model around one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from softsphere.matrix import FactoredTensor, StructuredGradient
from softsphere.matrix.blocks import Blocks
from softsphere.matrix.factored_matrix import Block
from softsphere.matrix.lists import once
from softsphere.matrix.refusals import stale

__all__ = ["FactoredSGD"]

BUFFER = "momentum_buffer"
# The square of what a step makes has to be a number in float32.
LARGEST_RATE = 1e18
ALGORITHMS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
}


class FactoredSGD(torch.optim.Optimizer):
    """`torch.optim.SGD` that also steps factored weights with momentum, exactly.

    A `FactoredTensor`, the weight of a FactoredSphericalLoss, is stepped in O(m d² + m² d) for m
    rows; its momentum is a second matrix of its size, kept factored beside it. Ordinary parameters
    are stepped by PyTorch's own code, so that one optimizer can train a whole model: by SGD with
    the options of their group, or by AdamW in a group that has ``"algorithm": "adamw"`` and the
    options of `torch.optim.AdamW`, whose defaults hold for what the group does not say.

    With a prior the matrix that is stepped is diag(√π) [W b].

    Args:
        params: parameters, named parameters, or groups of them, as of every optimizer.
        lr, momentum, dampening, weight_decay, nesterov, maximize, foreach: as in `torch.optim.SGD`.
            Good rates for a factored weight grow with its number of classes D.
        differentiable, fused: must be False or None.

    Raises: ValueError or TypeError for what `torch.optim.SGD` refuses; from `step`,
    softsphere.matrix.SingularStepError where a step cannot be taken, with no factored weight and
    no ordinary parameter changed.

    Source: `torch.optim.SGD`; Vincent et al. 2016, arXiv:1606.08061, for the factored step.

    >>> import softsphere
    >>> trunk, head = torch.nn.Linear(4, 4), softsphere.FactoredSphericalLoss(4, 50)
    >>> optimizer = FactoredSGD(
    ...     [
    ...         {"params": head.parameters(), "momentum": 0.9},
    ...         {"params": trunk.parameters(), "algorithm": "adamw", "lr": 1e-3},
    ...     ],
    ...     lr=1.0,
    ... )
    >>> head(trunk(torch.randn(2, 4)), torch.tensor([3, 7])).backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"params must be parameters, got a {type(params).__name__}; "
                "give it .parameters() instead"
            )
        for name, value in (("differentiable", differentiable), ("fused", fused)):
            if value:
                raise ValueError(f"{name} must be False: FactoredSGD has no such form")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Any) -> None:
        """A group of parameters, checked before it is taken."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError("a param group must be a dict with the key 'params'")
        group = dict(param_group)
        given = group["params"]
        if isinstance(given, torch.nn.Module):
            raise TypeError(
                f"params must be parameters, got a {type(given).__name__}; give it .parameters()"
            )
        if isinstance(given, Tensor):
            given = [given]
        group["params"] = given if isinstance(given, set) else list(given)  # PyTorch refuses a set
        algorithm = group.setdefault("algorithm", "sgd")
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        if algorithm == "adamw":
            plain = [x[1] if isinstance(x, tuple) else x for x in group["params"]]
            if any(isinstance(x, FactoredTensor) for x in plain):
                raise TypeError(
                    "a factored weight cannot be stepped by AdamW; put it into a group of its own, "
                    "whose algorithm is 'sgd'"
                )
            options = {k: v for k, v in group.items() if k not in ("params", "algorithm")}
            # PyTorch's own checks and defaults; its parameters are not ours to hold
            filled = torch.optim.AdamW([{**options, "params": plain}]).param_groups[0]
            group = {**{k: v for k, v in filled.items() if k != "params"}, **group}
        else:
            check_options({**self.defaults, **group})
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("algorithm", "sgd")
            for name in ("nesterov", "maximize", "differentiable"):
                group.setdefault(name, False)
            for name in ("foreach", "fused"):
                group.setdefault(name, None)

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer; the momentum of a factored weight is an ordinary (D, w) tensor,
        that of [W b]."""
        packed = super().state_dict()
        packed["state"] = {key: unpacked(state) for key, state in packed["state"].items()}
        return packed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_rate(group["lr"])
            if group["algorithm"] == "sgd":
                check_options(group)
        ours = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if isinstance(p, FactoredTensor) and p.grad is not None
        ]
        once([p for p, _ in ours])
        steps = [self.planned(p, group) for p, group in ours]
        for take in steps:
            take()
        for group in self.param_groups:
            rest = [p for p in group["params"] if not isinstance(p, FactoredTensor)]
            if rest:
                self.step_plain(group, rest)
        return loss

    def step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """A step of ordinary parameters by PyTorch's own optimizer, which borrows our state."""
        kind = ALGORITHMS[group["algorithm"]]
        inner = kind.__new__(kind)
        inner.__setstate__(
            {
                "defaults": group,
                "state": self.state,
                "param_groups": [{**group, "params": params}],
            }
        )
        # less the hooks of all optimizers, which see the step of this one
        step: Any = kind.step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        step(inner)

    def planned(self, p: FactoredTensor, group: dict[str, Any]) -> Callable[[], None]:
        """What steps a factored weight when it is called.

        W ← W − lr·g, or with B ← momentum·B + (1 − dampening)·g what SGD makes of B, where
        g = G + weight_decay·W.
        """
        lr, mu, decay = (float(group[name]) for name in ("lr", "momentum", "weight_decay"))
        matrix, sign = p.matrix, -1.0 if group["maximize"] else 1.0
        grad = p.grad
        if not isinstance(grad, StructuredGradient):
            raise TypeError(
                "the gradient of a factored weight must be a StructuredGradient, as the layer's "
                f"loss leaves it, got {type(grad).__name__}; FactoredSGD cannot step a dense one, "
                "torch.optim.SGD without momentum can"
            )
        content = grad.content
        if content.edition not in (None, matrix.edition):
            raise stale()
        gradient = content.value.to(p.dtype, p.device)
        state = self.state[p] if mu or p in self.state else {}
        buffer = state.get(BUFFER)
        started = buffer is not None
        if not mu and not started:
            if matrix.arrays.blocks > 1 and (matrix.beside is None or matrix.beside() is None):
                matrix.part_()
            base = identity(matrix.arrays.blocks)
            base[0][0] -= lr * decay
            spread = [-lr * sign] + [0.0] * (matrix.arrays.blocks - 1)
            return matrix.plan(gradient, Blocks(frozen(base), tuple(spread)))
        share = (1 - float(group["dampening"])) if started else 1.0
        if not mu:
            base, spread = [[1 - lr * decay, 0.0], [0.0, 1.0]], [-lr * sign, 0.0]
        elif group["nesterov"]:
            spread = [-lr * (1 + mu) * sign, sign]
            base = [[1 - lr * (1 + mu) * decay, decay], [-lr * mu * mu, mu]]
        else:
            spread = [-lr * share * sign, share * sign]
            base = [[1 - lr * share * decay, share * decay], [-lr * mu, mu]]
        blocks = Blocks(frozen(base), tuple(spread))
        if isinstance(buffer, FactoredTensor) and buffer.matrix is matrix:
            return matrix.plan(gradient, blocks)
        # new, or from a state_dict, a copy or another device: to be kept beside the weight
        values = unpacked(state)[BUFFER] if started else None
        if values is not None and values.shape != p.shape:
            raise ValueError(
                f"the momentum of a factored weight must have shape {tuple(p.shape)}, got "
                f"{tuple(values.shape)}; the optimizer's state is that of another layer"
            )
        owner = Block(matrix, 0)
        matrix.widen_(owner, blocks, values)
        step = matrix.plan(gradient, blocks)

        def take() -> None:
            # not before: a step that is refused has not begun the momentum
            step()
            state[BUFFER] = FactoredTensor.alias(owner)

        return take


def unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter with its momentum as an ordinary tensor, in memory of its own."""
    buffer = state.get(BUFFER)
    if not isinstance(buffer, FactoredTensor):
        return state
    dense = buffer.matrix.arrays.to_dense(columns=buffer.block.columns)
    return {**state, BUFFER: dense}


def identity(k: int) -> list[list[float]]:
    return [[float(a == b) for b in range(k)] for a in range(k)]


def frozen(base: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in base)


def check_rate(lr: Any) -> None:
    """Raises ValueError for a learning rate that no step can have."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {lr.numel()} elements")
    value = float(lr)
    if not 0 <= value <= LARGEST_RATE:
        raise ValueError(f"Invalid learning rate: lr must be from 0 to {LARGEST_RATE:g}, got {lr}")


def check_options(options: dict[str, Any]) -> None:
    """The checks of torch.optim.SGD, and that every number is one."""
    check_rate(options["lr"])
    for name in ("momentum", "dampening", "weight_decay"):
        value = float(options[name])
        if not math.isfinite(value) or (value < 0 and name != "dampening"):
            what = "number" if name == "dampening" else "non-negative number"
            raise ValueError(f"Invalid {name} value: it must be a {what}, got {options[name]}")
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
