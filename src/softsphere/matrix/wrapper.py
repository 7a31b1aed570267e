"""How an operation of PyTorch on a factored weight finds the function that does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import without_torch_function
from softsphere.matrix.python_operators import define_operators
from softsphere.matrix.refusals import DISTRIBUTED, refusal
from softsphere.matrix.turns import turn

__all__ = ["OPERATIONS", "RULES", "Operand", "Wrapper"]

Operand = Tensor | float

_aten = torch.ops.aten

# The function for each operation, by the type of the first argument that is ours, or `list`; and
# for each type the function for all other operations. `table` fills both.
OPERATIONS: dict[type, dict[Any, Callable[..., Any]]] = {}
RULES: dict[type, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does the operation, or raises TypeError before anything has changed."""
    packet = func.overloadpacket
    if packet in OPERATIONS[list]:
        return OPERATIONS[list][packet](func, *args, **kwargs)
    if packet.__name__.startswith("_foreach_"):
        return RULES[list](func, args, kwargs)
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Wrapper)]
    what = given[0].described if given else "a factored weight or its gradient"
    if "out" in kwargs and packet is not _aten.eye:
        # DistributedDataParallel scales a gradient into its bucket like this.
        raise refusal(func, what, DISTRIBUTED)
    if not given:  # they are in a list
        raise refusal(func, what)
    kind = type(given[0])
    handler = OPERATIONS.get(kind, {}).get(packet)
    if handler is not None:
        return handler(func, *args, **kwargs)
    if kind in RULES:
        return RULES[kind](func, args, kwargs)
    raise refusal(func, what)


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, whose operations are looked up, or refused."""

    described = "a factored weight"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with turn():
            return _dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.isfinite, torch.Tensor.isfinite):
            # PyTorch would compute it from |x|, which is not available.
            return args[0].is_finite()
        with without_torch_function():
            if not torch.is_inference_mode_enabled():
                return func(*args, **(kwargs or {}))
            # There PyTorch neither takes composite operations apart nor makes views of these.
            with torch.inference_mode(False), torch.no_grad():
                return func(*args, **(kwargs or {}))

    def become(self, other: Any) -> None:
        """Makes this tensor stand for the same weight or gradient as another of its type.

        Raises TypeError for a tensor that is a view of one.
        """
        raise TypeError(
            "a view of a factored weight cannot be replaced by another one; write into it with "
            "copy_, or assign to the weight itself"
        )

    @property
    def data(self) -> Tensor:
        """The same weight or gradient, for operations that autograd does not record."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if type(value) is type(self) and value.shape == self.shape:
            # This is how a module is moved to another dtype or device.
            torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            self.become(value)
            return
        raise TypeError(
            f"the data of a {type(self).__name__} cannot be replaced by another tensor; write it "
            "with copy_ under torch.no_grad(), or with load_state_dict"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Raises TypeError; use `to_dense`."""
        raise TypeError(f"a {type(self).__name__} has no memory for NumPy to read; use to_dense()")

    def share_memory_(self) -> Tensor:
        """Raises TypeError, since processes would not see one another's steps."""
        raise TypeError(
            f"a {type(self).__name__} cannot be shared between processes; send a copy of the "
            "layer or its state_dict()"
        )


define_operators(Wrapper)
