"""The leaves of a clustered layer as a factored weight, saved and loaded as ordinary tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from softsphere._torch import changed_in_place, transforms_active, values_readable
from softsphere.engines.factored_statistics import TWICE_IN_CLUSTERS
from softsphere.functional.loading import Loading, LoadsEntries
from softsphere.heads.factored_parameter import (
    WithFactoredParameter,
    check_factored_dtype,
    lent_columns,
    size_errors,
)
from softsphere.matrix import FactoredTensor, Health
from softsphere.matrix.factored_stack import FactoredStack
from softsphere.matrix.interrupts import undisturbed
from softsphere.matrix.refusals import HALF
from softsphere.matrix.turns import turn

__all__ = ["FactoredLeaves", "factored_leaves", "of_the_same_leaves"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def factored_leaves(W: Tensor, b: Tensor | None, starts: Tensor, pi: Tensor) -> FactoredTensor:
    """Returns diag(√π) [W b] in factors, a matrix for each cluster.

    Args:
        W, b: (L, d) and (L) or None, which are not copied.
        starts: (C + 1) the first leaf of each cluster, and L.
        pi: (L) the base measure, which is copied.

    Raises TypeError for a dtype in which there are no factored weights.
    """
    check_factored_dtype(W.dtype)
    columns = [W] if b is None else [W, b.unsqueeze(1)]
    return FactoredTensor.stack(columns, starts, pi.to(W.device, W.dtype, copy=True))


def of_the_same_leaves(method: _Method) -> _Method:
    """A method that reads factored leaves as they are at one time, also while a thread trains."""

    @functools.wraps(method)
    def run(self: FactoredLeaves, *args: Any, **kwargs: Any) -> Any:
        if self.engine != "factored":
            return method(self, *args, **kwargs)
        with turn():
            return method(self, *args, **kwargs)

    return cast(_Method, run)


class FactoredLeaves(WithFactoredParameter, LoadsEntries):
    """A layer whose leaves are ordinary parameters `weight` and `bias`, or one factored `weight`.

    With engine="factored" the parameter is diag(√π) [W b] (L, d'+1), and `bias` is None. Its
    state_dict has weight (L, d') and bias (L) all the same, so that every engine can load it.
    """

    engine: str
    has_bias: bool
    leaf_width: int
    prior: Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None

    def _stack(self) -> FactoredStack:
        """The factors of the leaves.

        Raises TypeError if the layer's engine is another one, or its weight was replaced.
        """
        weight: Tensor = self.weight
        if not isinstance(weight, FactoredTensor) or not isinstance(weight.matrix, FactoredStack):
            raise TypeError(
                "the weight must be the factored one of a ClusteredLoss with engine='factored', "
                f"got {type(weight).__name__}; load other values by load_state_dict"
            )
        return weight.matrix

    def _check_factored(self) -> None:
        """Raises an error where factored leaves cannot be used, and where others are factored."""
        factored = isinstance(self.weight, FactoredTensor)
        if self.engine != "factored":
            if factored:
                raise TypeError(
                    f"engine={self.engine!r} needs an ordinary weight, got a FactoredTensor; make "
                    "a new layer with engine='factored' and load the state_dict() into it"
                )
            return
        if transforms_active():
            raise RuntimeError(TWICE_IN_CLUSTERS)
        W = self._stack().arrays
        if not self.weight.is_leaf:
            raise TypeError(
                "the weight of factored leaves must be a parameter of its own, but it is computed "
                "from another one (a parametrization); remove that, or use engine='logits'"
            )
        if W.pi is None or W.pi.is_meta != self.prior.is_meta:
            raise RuntimeError(
                "the base measure of the factored leaves has no values, since the layer was made "
                "on the meta device; load it by load_state_dict, or call reset_parameters()"
            )

    def _check_measure_of_factors(self) -> None:
        """Raises RuntimeError if the factored leaves were made for other values of `prior`."""
        if self.engine != "factored":
            return
        W, pi = self._stack().arrays, self.prior
        assert W.pi is not None
        # Not equal to the last digit: factors that were made wider have normalised it again, and
        # averages of states with themselves round.
        if values_readable(pi) and not torch.allclose(pi.to(W.device, W.dtype), W.pi, 1e-4, 0.0):
            raise RuntimeError(
                "the buffer prior has been changed, but factored leaves are kept for the values "
                "that it had; load a state_dict() with another prior, which writes the leaves anew"
            )

    def _leaf_blocks(self) -> list[Tensor]:
        """The memory of weight (L, d') and bias, to be overwritten; then call `_leaves_written`."""
        if self.engine != "factored":
            return [self.weight] if self.bias is None else [self.weight, self.bias]
        W = self._stack().arrays
        W.V.own()
        return W.V.blocks

    def _leaves_written(self) -> None:
        """Takes what was written into `_leaf_blocks`, and the present base measure."""
        if self.engine == "factored":
            W = self._stack().arrays
            W.pi = self.prior.to(W.device, W.dtype, copy=True)
            self._stack().reset_()
            changed_in_place(self.weight)

    @torch.no_grad()
    def _write_leaves(self, *values: Tensor | None) -> None:
        """Writes the weight (L, d') and the bias (L), or leaves what is None or not given."""
        with undisturbed():
            if self.engine == "factored":
                self._stack().canonical_()
            for block, new in zip(self._leaf_blocks(), values, strict=False):
                if new is not None:
                    block.copy_(new.view(block.shape))
            self._leaves_written()

    def health(self, probes: int = 4) -> Health:
        """Returns the numerical state of factored leaves, that of the worst cluster.

        See `softsphere.matrix.Health`. Raises TypeError for another engine.
        """
        return self._stack().health(probes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredLeaves:
        if self.engine == "factored":
            # The layers above the leaves would have moved before the weight is refused.
            dtype = fn(torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)).dtype
            if dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{HALF}; got {dtype}")
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.engine != "factored":
            return
        with turn():
            self._stack().canonical_()
            lent = lent_columns(self._stack().arrays.V, bias=self.has_bias)
            destination.update({prefix + name: x for name, x in lent.items()})

    def _load_entries(self, state_dict: dict[str, Any], prefix: str, loading: Loading) -> None:
        """Loads weight and bias into the factors, and the rest as every module does."""
        if self.engine != "factored":
            super()._load_entries(state_dict, prefix, loading)
            return
        shapes: dict[str, tuple[int, ...]] = {"weight": (len(self.prior), self.leaf_width)}
        if self.has_bias:
            shapes["bias"] = (len(self.prior),)
        given = {name: state_dict[prefix + name] for name in shapes if prefix + name in state_dict}
        loading.missing_keys.extend(prefix + name for name in shapes if name not in given)
        wrong = size_errors(prefix, given, shapes)
        mine = {prefix + name for name in shapes}
        rest = {key: x for key, x in state_dict.items() if key not in mine}
        rest[f"{prefix}weight"] = self.weight
        before = len(loading.error_msgs)
        super()._load_entries(rest, prefix, loading)
        fits = not wrong and len(loading.error_msgs) == before
        weight, bias = (given.get(name) if fits else None for name in ("weight", "bias"))
        if weight is not None and loading.assigns:
            self._adopt(weight, bias)
        elif given or f"{prefix}prior" in state_dict:
            # The base measure may have been loaded in any case.
            self._write_leaves(weight, bias)
        loading.error_msgs.extend(wrong)

    def _adopt(self, W: Tensor, b: Tensor | None = None) -> None:
        """Makes a new parameter that takes the given tensors as they are, and copies the others."""
        if b is None and self.has_bias:
            with turn():
                self._stack().canonical_()
                b = self._stack().arrays.V.blocks[1].squeeze(1).clone()
        b = None if b is None else b.to(W.device, W.dtype)
        self._take(factored_leaves(W, b, self._stack().arrays.starts, self.prior))
