"""What `.grad` of a parameter holds while its gradient is yet to be computed.

Whoever reads such a gradient would read too little of it. So it is no number: what reads it raises,
be it an optimizer, clipping, a scaler or a data-parallel wrapper. What torch does to a gradient to
forget it or to add another one to it does the same here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import DISABLED_TORCH_FUNCTION, wrapper_tensor

__all__ = ["Pending", "Share", "refuse_step", "shares_of", "waiting", "withdraw"]

TOO_EARLY = (
    "the gradient of a parameter is pending inside accumulate(), and complete only when that ends: "
    "step the optimizer, clip gradients and unscale them after the context, not inside"
)
# The only one that reads it with a cause of its own.
READ_BY_WRAPPER = (
    "a data-parallel wrapper reads it early where another layer has the same parameter, too, or "
    "where it looks for unused ones; do without accumulate() there"
)

aten = torch.ops.aten


@dataclass(eq=False)
class Share:
    """What some batches give to a gradient: A (n, n) and v (n), and (H, target, gc) of each."""

    owner: object
    small: tuple[Tensor, Tensor]
    entries: list[tuple[Tensor, Tensor, Tensor]]

    def add(self, small: tuple[Tensor, Tensor], entry: tuple[Tensor, Tensor, Tensor]) -> None:
        self.small = self.small[0] + small[0], self.small[1] + small[1]
        self.entries.append(entry)


@dataclass(eq=False)
class Waiting:
    """A gradient that is `before`, which was there already, and what the shares come to."""

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
        """Adds to what was there before, as autograd adds to a gradient."""
        if self.before is None:
            # a copy, since whose x is may write over it
            self.before = x.clone()
        elif self.before.is_sparse and not x.is_sparse:
            self.before = x + self.before
        else:
            self.before.add_(x)


class Pending(Tensor):
    """Of the shape, dtype and device of a gradient, without its numbers."""

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
            # as autograd adds what another use of the parameter gives
            if func is aten.add_.Tensor and not kwargs and addable(x, rest[0]):
                x.waiting.add(rest[0])
                return x
        raise RuntimeError(f"{TOO_EARLY} (what reads it is {func}; {READ_BY_WRAPPER})")


def addable(to: Pending, x: object) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Pending) and x.shape == to.shape


def waiting(x: Tensor) -> Waiting:
    """What `.grad` of x waits for; from now on, if for nothing yet."""
    if not isinstance(x.grad, Pending):
        # None, too, where the optimizer has set it so since: what was pending is forgotten
        x.grad = Pending(x, Waiting(x.grad))
    return x.grad.waiting


def shares_of(x: Tensor | None, owner: object) -> list[Share]:
    """The owner's among those that `.grad` of x waits for."""
    if x is None or not isinstance(x.grad, Pending):
        return []
    return [share for share in x.grad.waiting.shares if share.owner is owner]


def withdraw(x: Tensor | None, owner: object) -> list[Share]:
    """Takes the owner's shares out of what `.grad` of x waits for, and where there are no others
    puts back what was there before."""
    mine = shares_of(x, owner)
    if x is not None and isinstance(x.grad, Pending):
        kept = x.grad.waiting
        kept.shares = [share for share in kept.shares if share.owner is not owner]
        if not kept.shares:
            kept.over = True
            x.grad = kept.before
    return mine


def refuse_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Before a step: most optimizers would find a pending gradient when some of what is theirs has
    moved already."""
    for group in optimizer.param_groups:
        if any(isinstance(x.grad, Pending) for x in group["params"]):
            raise RuntimeError(TOO_EARLY)
