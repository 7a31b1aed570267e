"""The factored weight of a layer, and its state_dict with weight, bias and prior as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks
from softsphere._torch import changed_in_place, exporting, is_wrapper
from softsphere.functional.loading import Loading
from softsphere.heads.factored_parameter import WithFactoredParameter, lent_columns, size_errors
from softsphere.heads.factored_reader import EXPORT
from softsphere.heads.sharded import ShardedLayer
from softsphere.matrix import FactoredTensor
from softsphere.matrix.factored_matrix import FactoredMatrix, single_matrix
from softsphere.matrix.interrupts import undisturbed
from softsphere.matrix.turns import in_turn

__all__ = ["FactoredState"]


class FactoredState(ShardedLayer, WithFactoredParameter):
    """A layer with a factored weight whose state_dict is that of an `nn.Linear`, and its prior.

    Its shapes are those of the rows of this rank, where it has a process group.
    """

    norm_is_of_all = True
    saved_together = True  # U and ω, which are those of all ranks, become I and 0
    in_features: int
    num_classes: int
    has_bias: bool
    weight: nn.Parameter

    @property
    def _factored_weight(self) -> FactoredTensor:
        """The parameter `weight`.

        Raises TypeError or ValueError if it was replaced by one that this layer cannot use, and
        RuntimeError where a program is exported.
        """
        if exporting():
            raise RuntimeError(EXPORT)
        weight: Tensor = self.weight
        if not isinstance(weight, FactoredTensor):
            raise TypeError(
                "the weight of a FactoredSphericalLoss must be a softsphere.matrix.FactoredTensor, "
                f"got {type(weight).__name__}; load other values by load_state_dict, or use "
                "LinearSphericalLoss, whose weight may be any tensor"
            )
        wanted = (self._own_classes, self.in_features + self.has_bias)
        if tuple(weight.shape) != wanted:
            raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
        return weight

    @property
    def _own_classes(self) -> int:
        """The number of classes of this rank, which are all without a process group."""
        return self.num_classes if self.shards is None else len(self.shards.sharding)

    @property
    def matrix(self) -> FactoredMatrix:
        """The matrix that holds [W b] in factors."""
        return single_matrix(self._factored_weight.block)

    @in_turn
    def _saved(self) -> dict[str, Tensor]:
        """Returns weight (D, d), bias (D) and prior (D); see `lent_columns`."""
        self.matrix.canonical_()
        W = self.matrix.arrays
        state = lent_columns(W.V, bias=self.has_bias)
        if W.pi is not None:
            state["prior"] = W.pi.clone()
        return state

    def _check_saving(self) -> None:
        super()._check_saving()
        single_matrix(self._factored_weight.block)

    def _local_state(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, value in self._saved().items():
            destination[prefix + name] = value

    def _of_all(self, name: str) -> str | None:
        return name

    def _own_tensors(self) -> list[str]:
        prior = [] if self.matrix.arrays.pi is None else ["prior"]
        return ["weight", *(["bias"] if self.has_bias else []), *prior]

    def _whole(self, key: str, x: Tensor) -> Tensor:
        whole = key.endswith("prior") and not is_wrapper(x)
        return checks.loaded_prior(x, self.weight.dtype) if whole else x

    def _load_local_entries(
        self, state_dict: dict[str, Any], prefix: str, loading: Loading
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = {"weight": (self._own_classes, self.in_features)}
        if self.has_bias:
            shapes["bias"] = (self._own_classes,)
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        adopt = loading.assigns and "weight" in own
        dtype = own["weight"].dtype if adopt else self.weight.dtype
        state = _Entries(own, shapes, self.matrix.arrays.pi, dtype, self.shards is None)
        missing, errors = state.missing(), state.errors(prefix)
        loading.missing_keys.extend(prefix + name for name in missing)
        loading.unexpected_keys.extend(prefix + name for name in state.unexpected())
        loading.error_msgs.extend(errors)
        if errors or own.keys().isdisjoint((*shapes, "prior")):
            return
        # PyTorch does not tell a module whether the caller asked for all entries. What is given is
        # loaded, as in an nn.Linear, and the caller hears of the rest.
        with torch.no_grad():
            (self._adopt if adopt else self._assign)(state.columns(), state.prior())

    def _adopt(self, columns: list[Tensor | None], pi: Tensor | None) -> None:
        """Makes a new parameter that takes the given tensors as they are, and copies the others."""
        own = self._saved() if any(x is None for x in columns) else {}
        weight, *bias = (
            own[name].detach().clone() if x is None else x
            for name, x in zip(("weight", "bias"), columns, strict=False)
        )
        bias = [x.to(weight.device, weight.dtype) for x in bias]
        pi = None if pi is None else pi.to(weight.device, weight.dtype)
        self._take(FactoredTensor(weight, bias[0] if bias else None, pi, self.shards))

    def _assign(self, columns: list[Tensor | None], pi: Tensor | None) -> None:
        """Writes weight (D, d) and bias (D) into the parameter, or leaves what is None.

        Momentum beside it stays.
        """
        W = self.matrix.arrays
        with undisturbed():
            blocks = self._writable(whole=all(x is not None for x in columns))
            for block, values in zip(blocks, columns, strict=True):
                if values is not None:
                    block.copy_(values.view(block.shape))
            W.pi = None if pi is None else pi.to(W.device, W.dtype)
            self._written()

    def _writable(self, *, whole: bool = True) -> list[Tensor]:
        """The memory of weight and bias, to be overwritten, followed by `_written`.

        whole: whether all of it will be, so that it need not have the present values.
        """
        W = self.matrix.arrays
        if W.blocks > 1 or not whole:
            self.matrix.canonical_()
        W.V.own()
        return W.V.blocks[: 1 + self.has_bias]

    def _written(self) -> None:
        self.matrix.reset_()
        changed_in_place(self.weight)


@dataclass(frozen=True)
class _Entries:
    """The entries of a state_dict that belong to one factored layer, by their names in it.

    given: the entries.
    shapes: of weight and bias, as the layer has them.
    pi: (D) the prior of the layer, or None.
    dtype: of the layer once it is loaded.
    whole: whether they have all classes, over which a prior is normalised.
    """

    given: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    pi: Tensor | None
    dtype: torch.dtype
    whole: bool

    def missing(self) -> list[str]:
        """Names that must be there. An nn.Linear has no prior, which then stays as it is."""
        return [name for name in self.shapes if name not in self.given]

    def unexpected(self) -> list[str]:
        """Names that the layer does not know."""
        known = {*self.shapes} if self.pi is None else {*self.shapes, "prior"}
        return [name for name in self.given if name not in known]

    def errors(self, prefix: str) -> list[str]:
        """What does not fit, in PyTorch's words where it has some."""
        wrong = size_errors(prefix, self.given, self.shapes)
        if self.dtype not in (torch.float32, torch.float64):
            wrong.append(
                f"{prefix}weight must be float32 or float64 to be assigned, got {self.dtype}."
            )
            return wrong
        try:
            self.prior()
        except (TypeError, ValueError) as error:
            wrong.append(f"{prefix}prior cannot be loaded: {error}")
        return wrong

    def prior(self) -> Tensor | None:
        """The prior of the layer once it is loaded, normalised.

        Raises ValueError or TypeError for one that cannot be the prior of the layer.
        """
        if self.pi is None or "prior" not in self.given:
            return self.pi
        given: Tensor = self.given["prior"]
        pi = checks.loaded_prior(given, self.dtype) if self.whole else given.to(self.dtype)
        checks.class_vector("prior", pi, self.shapes["weight"][0])
        return pi

    def columns(self) -> list[Tensor | None]:
        """Weight and bias, None for what is missing."""
        given = (self.given.get(name) for name in self.shapes)
        return [None if x is None else x.detach() for x in given]
