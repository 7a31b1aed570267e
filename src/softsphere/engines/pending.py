"""The `.grad` of a parameter while its gradient is still to be computed.

Code that reads such a gradient would read only a part of it. So a pending gradient has no numbers,
and reading it raises an error, in an optimizer, in clipping, in a scaler or in a data-parallel
wrapper. The operations by which torch forgets a gradient, or adds another one to it, work as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import DISABLED_TORCH_FUNCTION, wrapper_tensor
from softsphere.engines.target_rows import TargetRows

__all__ = ["Pending", "Share", "refuse_step", "shares_of", "waiting", "withdraw"]

TOO_EARLY = (
    "the gradient of a parameter is pending inside accumulate(), and complete only when that ends: "
    "step the optimizer, clip gradients and unscale them after the context, not inside"
)
# A wrapper is the only reader that acts for a reason of its own.
READ_BY_WRAPPER = (
    "a data-parallel wrapper reads it early where another layer has the same parameter, too, or "
    "where it looks for unused ones; do without accumulate() there"
)

aten = torch.ops.aten


@dataclass(eq=False)
class Share:
    """The share of some batches in a gradient: A (n, n), v (n), and the targets of each batch."""

    owner: object
    small: tuple[Tensor, Tensor]
    targets: list[TargetRows]

    def add(self, small: tuple[Tensor, Tensor], targets: list[TargetRows]) -> None:
        self.small = self.small[0] + small[0], self.small[1] + small[1]
        self.targets += targets


@dataclass(eq=False)
class Waiting:
    """A gradient that consists of `before`, which existed already, and of shares."""

    before: Tensor | None
    shares: list[Share] = field(default_factory=list)
    over: bool = False

    def forget(self, like: Tensor) -> None:
        self.shares = []
        if self.before is None:
            made: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
            self.before = torch.empty_strided(like.shape, like.stride(), **made)
        self.before.zero_()

    def add(self, x: Tensor) -> None:
        """Adds x to the gradient that existed before, as autograd does."""
        if self.before is None:
            # a copy, since the owner of x may write into it
            self.before = x.clone()
        elif self.before.is_sparse and not x.is_sparse:
            self.before = x + self.before
        else:
            self.before.add_(x)


class Pending(Tensor):
    """A tensor with the shape, dtype and device of a gradient, without its numbers."""

    waiting: Waiting

    @staticmethod
    def __new__(cls, like: Tensor, waiting: Waiting) -> Pending:
        out = wrapper_tensor(cls, like.shape, like.dtype, like.device, like.stride())
        out.waiting = waiting
        return out

    def __init__(self, like: Tensor, waiting: Waiting) -> None:
        super().__init__()

    # The results of operations are not pending gradients themselves.
    __torch_function__ = DISABLED_TORCH_FUNCTION

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<pending gradient of shape {tuple(self.shape)}, {self.dtype}>"

    def __reduce_ex__(self, protocol: object) -> Any:
        raise RuntimeError(TOO_EARLY)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        x, *rest = args or (None,)
        if func in (aten.detach.default, aten.alias.default):
            return cls(x, x.waiting)
        if func is aten._foreach_zero_.default:
            for each in x:
                each.zero_()
            return None
        if isinstance(x, cls) and not x.waiting.over:
            if func is aten.zero_.default:
                x.waiting.forget(x)
                return x
            # autograd adds the gradient of another use of the parameter in this way
            if func is aten.add_.Tensor and not kwargs and _addable(x, rest[0]):
                x.waiting.add(rest[0])
                return x
        raise RuntimeError(f"{TOO_EARLY} (it was read by {func}; {READ_BY_WRAPPER})")


def _addable(to: Pending, x: object) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Pending) and x.shape == to.shape


def waiting(x: Tensor) -> Waiting:
    """The parts that `.grad` of x waits for. It becomes a pending gradient if it is none yet."""
    if not isinstance(x.grad, Pending):
        # also if an optimizer has set it to None meanwhile, which forgets the pending shares
        x.grad = Pending(x, Waiting(x.grad))
    return x.grad.waiting


def shares_of(x: Tensor | None, owner: object) -> list[Share]:
    """The shares of an owner that `.grad` of x waits for."""
    if x is None or not isinstance(x.grad, Pending):
        return []
    return [share for share in x.grad.waiting.shares if share.owner is owner]


def withdraw(x: Tensor | None, owner: object) -> list[Share]:
    """Takes the shares of an owner out of `.grad` of x, and returns them.

    If no other shares are left, `.grad` becomes what it was before.
    """
    mine = shares_of(x, owner)
    if x is not None and isinstance(x.grad, Pending):
        kept = x.grad.waiting
        kept.shares = [share for share in kept.shares if share.owner is not owner]
        if not kept.shares:
            kept.over = True
            x.grad = kept.before
    return mine


def refuse_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Raises RuntimeError before a step if one of the gradients is pending.

    Without this, most optimizers would meet it after they have changed other parameters.
    """
    for group in optimizer.param_groups:
        if any(isinstance(x.grad, Pending) for x in group["params"]):
            raise RuntimeError(TOO_EARLY)
