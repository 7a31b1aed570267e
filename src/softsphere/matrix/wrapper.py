"""How operations of PyTorch reach the table of what they do to a factored weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softsphere.matrix.refusals import DISTRIBUTED, refusal

__all__ = ["OPERATIONS", "RULES", "Wrapper", "dispatch"]

aten = torch.ops.aten

# What to do for each operation, by the kind of the first tensor that is ours, or `list`; and what
# to do for all others of that kind. Filled by table.py.
OPERATIONS: dict[type, dict[Any, Callable[..., Any]]] = {}
RULES: dict[type, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does the operation, or refuses it before anything has changed."""
    packet = func.overloadpacket
    if packet in OPERATIONS[list]:
        return OPERATIONS[list][packet](func, *args, **kwargs)
    if packet.__name__.startswith("_foreach_"):
        return RULES[list](func, args, kwargs)
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Wrapper)]
    what = given[0].described if given else "a factored weight or its gradient"
    if "out" in kwargs and packet is not aten.eye:
        # this is how DistributedDataParallel scales a gradient into its bucket
        raise refusal(func, what, DISTRIBUTED)
    if not given:  # in a list
        raise refusal(func, what)
    kind = type(given[0])
    handler = OPERATIONS.get(kind, {}).get(packet)
    if handler is not None:
        return handler(func, *args, **kwargs)
    if kind in RULES:
        return RULES[kind](func, args, kwargs)
    raise refusal(func, what)


class Wrapper(torch.Tensor):
    """A tensor without numbers of its own: every operation is looked up, or refused."""

    described = "a factored weight"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.isfinite, torch.Tensor.isfinite):
            # PyTorch would ask this of |x|, which is not known
            return args[0].is_finite()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __eq__(self, other: Any) -> Any:
        # as with __pow__ below: else Python would compare identities in its stead
        return torch.eq(self, other) if isinstance(other, (Tensor, float, int)) else NotImplemented

    def __ne__(self, other: Any) -> Any:
        return torch.ne(self, other) if isinstance(other, (Tensor, float, int)) else NotImplemented

    __hash__ = torch.Tensor.__hash__

    def __pow__(self, exponent: Any) -> Tensor:
        # the operator of PyTorch turns what is refused into another error
        return torch.pow(self, exponent)

    def become(self, other: Any) -> None:
        """Takes over what another tensor of this kind is."""
        raise NotImplementedError

    @property
    def data(self) -> Tensor:
        """The same tensor for operations that autograd does not see."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if type(value) is type(self) and value.shape == self.shape:
            # as when a module is moved to another dtype or device
            torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            self.become(value)
            return
        raise TypeError(
            f"the data of a {type(self).__name__} cannot be replaced by another tensor; write it "
            "with copy_ under torch.no_grad(), or with load_state_dict"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Refused: see `to_dense`."""
        raise TypeError(f"a {type(self).__name__} has no memory for NumPy to read; use to_dense()")

    def share_memory_(self) -> Tensor:
        """Refused: processes that step it at the same time would not see one another's steps."""
        raise TypeError(
            f"a {type(self).__name__} cannot be shared between processes; send a copy of the "
            "layer or its state_dict()"
        )
