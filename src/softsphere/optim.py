"""SGD with momentum for factored weights, and the optimizer of a whole model around one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from softsphere import checks
from softsphere._torch import capturable_state, changed_in_place
from softsphere.matrix import FactoredTensor, StructuredGradient
from softsphere.matrix.abstract import Block
from softsphere.matrix.default_rate import default_rate
from softsphere.matrix.lists import check_distinct
from softsphere.matrix.refusals import stale
from softsphere.matrix.sgd_blocks import momentum_step, plain_step
from softsphere.matrix.turns import turn
from softsphere.parallel import own_rows, whole_tensor

__all__ = ["FactoredSGD"]

_BUFFER = "momentum_buffer"
_AUTO = "auto"
_ALGORITHMS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
}


class FactoredSGD(torch.optim.Optimizer):
    """`torch.optim.SGD` that also steps factored weights with momentum, exactly.

    A `FactoredTensor`, the weight of a FactoredSphericalLoss, is stepped in O(m d² + m² d) for m
    rows. Its momentum is a second matrix of its size, which is kept in factors beside it. With a
    prior the matrix that is stepped is diag(√π) [W b].

    Ordinary parameters are stepped by PyTorch's own code, so that one optimizer can train a whole
    model. A group uses SGD with its options, unless it has ``"algorithm": "adamw"``. Then it uses
    AdamW with its options, and the defaults of `torch.optim.AdamW` for those that it lacks.

    Args:
        params: parameters, named parameters, or groups of them, as for every optimizer.
        lr: the learning rate, at most 1e18. "auto" is (1 − momentum) D / 100 for a group of
            factored weights of D classes, since good rates grow with D, and 0.001 for a group of
            ordinary parameters; a group of both needs a number. D / 100 is for the mean loss of a
            distribution; the squared error and the Z-loss need others.
        momentum, dampening, weight_decay, nesterov, maximize, foreach: as in `torch.optim.SGD`.
        differentiable, fused: must be False or None.
        capturable: whether a step reads nothing from the device, so that `softsphere.CapturedStep`
            can capture it. The learning rate may then be a tensor on the device of the parameters,
            and so may momentum and weight_decay of a group of factored weights alone. Ordinary
            parameters are stepped by PyTorch's fused SGD, or by AdamW with capturable=True.

    Raises ValueError or TypeError for what `torch.optim.SGD` refuses. `step` raises
    softsphere.matrix.SingularStepError if a step cannot be taken. Then no factored weight and no
    ordinary parameter has changed.

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
        lr: float | Tensor | str = "auto",
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        _refuse_module(params)
        for name, value in (("differentiable", differentiable), ("fused", fused)):
            if value:
                raise ValueError(f"{name} must be False: FactoredSGD has no such implementation")
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
            "capturable": capturable,
        }
        checks.sgd_options({**defaults, "lr": 1e-3} if _is_auto(lr) else defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Any) -> None:
        """Adds a group of parameters, after checks of its options.

        Raises ValueError or TypeError for options that SGD or AdamW refuses, and for a factored
        weight in a group with the algorithm "adamw".
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError("a param group must be a dict with the key 'params'")
        group = dict(param_group)
        given = group["params"]
        _refuse_module(given)
        given = [given] if isinstance(given, Tensor) else given
        group["params"] = given if isinstance(given, set) else list(given)  # PyTorch refuses sets
        plain = [x[1] if isinstance(x, tuple) else x for x in group["params"]]
        if (algorithm := group.setdefault("algorithm", "sgd")) not in _ALGORITHMS:
            raise ValueError(f"algorithm must be 'sgd' or 'adamw', got {algorithm!r}")
        group.setdefault("capturable", self.defaults["capturable"])
        if algorithm == "adamw":
            if any(isinstance(x, FactoredTensor) for x in plain):
                raise TypeError(
                    "a factored weight cannot be stepped by AdamW; put it into a group of its own, "
                    "whose algorithm is 'sgd'"
                )
            # An optimizer that is thrown away makes PyTorch's own checks and fills in defaults.
            options = {k: v for k, v in group.items() if k != "algorithm"} | {"params": plain}
            filled = torch.optim.AdamW([options]).param_groups[0]
            group = {**{k: v for k, v in filled.items() if k != "params"}, **group}
        else:
            if _is_auto(group.get("lr", self.defaults["lr"])):
                group["lr"] = default_rate(plain, group.get("momentum", self.defaults["momentum"]))
            checks.sgd_options({**self.defaults, **group})
        if group["capturable"]:
            _check_capturable({**self.defaults, **group}, plain)
        super().add_param_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        lacking: dict[str, Any] = {"algorithm": "sgd", "foreach": None, "fused": None}
        flags = ("nesterov", "maximize", "differentiable", "capturable")
        lacking |= dict.fromkeys(flags, False)
        for group in self.param_groups:
            group.update({**lacking, **group})

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer, as for every optimizer.

        The momentum of a factored weight is in it as an ordinary tensor (D, w), that of [W b]. It
        is a DTensor with the placement Shard(0) where the layer has a process_group.
        """
        packed = super().state_dict()
        packed["state"] = {key: _saved(state) for key, state in packed["state"].items()}
        return packed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients, and returns the loss.

        Returns the loss of the closure, or None.

        Raises SingularStepError, TypeError or RuntimeError, before anything has changed, for a
        factored weight that cannot be stepped: because its gradient is not finite, is dense, or
        belongs to an earlier weight.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["algorithm"] == "sgd":
                checks.sgd_options(group)
            else:
                checks.learning_rate(group["lr"], unread=group["capturable"])
        ours = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if isinstance(p, FactoredTensor) and p.grad is not None
        ]
        check_distinct([p for p, _ in ours])
        with turn():
            steps = [(p, self._planned(p, group)) for p, group in ours]
            for p, take in steps:
                take()
                changed_in_place(p)
        for group in self.param_groups:
            rest = [p for p in group["params"] if not isinstance(p, FactoredTensor)]
            if rest:
                self._step_plain(group, rest)
        return loss

    def _step_plain(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Steps ordinary parameters by PyTorch's own optimizer, with the state of this one."""
        kind = _ALGORITHMS[group["algorithm"]]
        inner = kind.__new__(kind)
        groups = [{**group, "params": params}]
        if group["capturable"] and kind is torch.optim.SGD:
            groups[0] |= {"fused": True, "foreach": False}
            if isinstance(group["lr"], Tensor):
                groups[0] |= {"lr": _for_fused_sgd(group["lr"])}
        elif all(p.device.type == "cpu" for p in params):
            groups[0] |= {"capturable": False}  # PyTorch's AdamW refuses it there
        state = {"defaults": group, "state": self.state, "param_groups": groups}
        inner.__setstate__(capturable_state(state))
        # Without the hooks that all optimizers share. They see the step of this one.
        step: Any = kind.step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        step(inner)

    def _planned(self, p: FactoredTensor, group: dict[str, Any]) -> Callable[[], None]:
        """Returns a function that steps a factored weight.

        The step is W ← W − lr·g with g = G + weight_decay·W, or with momentum what SGD makes of W
        and B ← momentum·B + (1 − dampening)·g.
        """
        mu, matrix = group["momentum"], p.matrix
        mu = True if isinstance(mu, Tensor) and group["capturable"] else float(mu)
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
        gradient = content.value.to(matrix.arrays.dtype, matrix.device)
        state = self.state[p] if mu or p in self.state else {}
        buffer = state.get(_BUFFER)
        started = buffer is not None
        if not mu and not started:
            if matrix.arrays.blocks > 1 and (matrix.beside is None or matrix.beside() is None):
                matrix.part_()
            return matrix.plan(gradient, plain_step(group, matrix.arrays.blocks))
        blocks = momentum_step(group, started)
        if isinstance(buffer, FactoredTensor) and buffer.matrix is matrix:
            return matrix.plan(gradient, blocks)
        # The momentum is new, or from a state_dict, a copy or another device.
        values = _unpacked(state)[_BUFFER] if started else None
        shards = matrix.arrays.shards
        if values is not None and shards is not None and not isinstance(buffer, FactoredTensor):
            values = own_rows(
                "the momentum of a factored weight", values, shards.ranks, shards.sharding
            )
        if values is not None and values.shape != p.shape:
            raise ValueError(
                f"the momentum of a factored weight must have shape {tuple(p.shape)}, got "
                f"{tuple(values.shape)}; the optimizer's state is that of another layer"
            )
        owner = Block(matrix, 0)
        matrix.widen_(owner, blocks, values)
        step = matrix.plan(gradient, blocks)

        def take() -> None:
            # Not before: a step that is refused must not begin the momentum.
            step()
            state[_BUFFER] = FactoredTensor.alias(owner)

        return take


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter, with its momentum as an ordinary tensor in memory of its own."""
    buffer = state.get(_BUFFER)
    if not isinstance(buffer, FactoredTensor):
        return state
    dense = buffer.matrix.arrays.to_dense(columns=buffer.block.columns)
    return {**state, _BUFFER: dense}


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter, with its momentum as an ordinary tensor of all classes."""
    buffer, saved = state.get(_BUFFER), _unpacked(state)
    shards = buffer.matrix.arrays.shards if isinstance(buffer, FactoredTensor) else None
    if shards is None:
        return saved
    return {**saved, _BUFFER: whole_tensor(saved[_BUFFER], shards.ranks, shards.sharding)}


def _check_capturable(group: dict[str, Any], params: list[Tensor]) -> None:
    """Raises TypeError or ValueError for options whose present value a graph could not read."""
    factored = [isinstance(p, FactoredTensor) for p in params]
    for name in ("lr", "momentum", "weight_decay"):
        value = group.get(name)
        if not isinstance(value, Tensor):
            continue
        if any(p.device != value.device for p in params):
            raise ValueError(
                f"{name} must be on the device of the parameters where capturable=True, got "
                f"{value.device}; a graph could not read its present value"
            )
        if name != "lr" and not all(factored):
            raise TypeError(
                f"{name} may be a tensor for a group of factored weights alone; give the ordinary "
                "parameters a group of their own"
            )


def _for_fused_sgd(lr: Tensor) -> Tensor:
    """A learning rate as the fused SGD of PyTorch reads it, which is in float32 on a GPU."""
    return lr if lr.device.type == "cpu" else lr.float()


def _is_auto(lr: Any) -> bool:
    return isinstance(lr, str) and lr == _AUTO


def _refuse_module(params: Any) -> None:
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"params must be parameters, got a {type(params).__name__}; give it .parameters()"
        )
