"""Layers whose parameters an output layer can share: those that compute W h + b and no more."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from softsphere._torch import has_own_call, hooks_of, is_dtensor, transforms_active
from softsphere.checks.kinds import FLOATING, dense
from softsphere.heads.computed_weights import has_computed_weights

__all__ = ["Tie", "plain_parameters"]

_TIED = (
    "to share its weight as it is, make an nn.Linear without a bias, set its weight to that of the "
    "embedding, and give that layer"
)
_INSTEAD = (
    "merge what it adds into the weight of a plain nn.Linear, or give the weight that it computes "
    "with to softsphere.functional.linear_spherical_loss"
)


def plain_parameters(
    linear: nn.Linear | nn.Embedding,
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Returns weight (D, d) and bias (D) or None of a layer that computes W h + b and no more.

    An nn.Embedding looks up the rows of its weight and nothing else; a tied output layer has them
    as its classes.

    Raises TypeError or ValueError for every other layer, with what can be done instead.
    """
    name = type(linear).__name__
    if not isinstance(linear, (nn.Linear, nn.Embedding)):
        raise TypeError(
            "linear must be an nn.Linear or an nn.Embedding, whose weight has one row for each "
            f"class, got {name}; if it wraps such a layer and changes nothing, give that layer; "
            f"otherwise {_INSTEAD}"
        )
    if any(isinstance(x, UninitializedParameter) for x in linear.parameters(recurse=False)):
        raise ValueError(
            f"linear must have a weight, but this {name} has not seen its first batch; call it "
            "once, or give it its sizes"
        )
    base: type[nn.Module] = nn.Linear if isinstance(linear, nn.Linear) else nn.Embedding
    if _has_own_forward(linear, base):
        raise TypeError(
            f"linear must compute what {base.__name__} computes, but this {name} has a forward of "
            f"its own, which the loss would pass over; {_INSTEAD if base is nn.Linear else _TIED}"
        )
    if parametrize.is_parametrized(linear):
        every = ", ".join(linear.parametrizations)  # type: ignore[arg-type]
        raise TypeError(
            f"linear must have plain parameters, but its {every} is computed by a parametrization; "
            "make the output layer from a plain layer and register the parametrization on that "
            "output layer, or remove it with torch.nn.utils.parametrize.remove_parametrizations"
        )
    hooks = ", ".join(_hook_names(linear))
    if hooks:
        raise TypeError(
            f"linear must have no hooks, but this {name} has {hooks}, which the loss would pass "
            "over; remove it first (torch.nn.utils.remove_spectral_norm and its siblings for the "
            "norms), or, if it only observes, register it after the output layer is made"
        )
    if isinstance(linear, nn.Embedding) and linear.max_norm is not None:
        raise ValueError(
            "linear must have the same rows for every use, but an nn.Embedding with max_norm "
            f"rewrites the rows that it looks up; make it without max_norm, or, {_TIED}"
        )
    return _checked_parameters(linear)


def _has_own_forward(layer: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a call of the layer runs anything but the forward of base."""
    return (
        type(layer).forward is not base.forward or "forward" in vars(layer) or has_own_call(layer)
    )


def _hook_names(layer: nn.Module) -> Iterator[str]:
    """The hooks that a call of the layer runs, each with its kind.

    Hooks on all modules (torch.nn.modules.module.register_module_forward_hook) are left out: they
    are for profiling, and they see the output layer as well. So are those of tensor parallelism,
    which place inputs and outputs: from_linear is told where the rows are.
    """
    sharded = is_dtensor(getattr(layer, "weight", None))
    for kind, hook in hooks_of(layer):
        if sharded and str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor"):
            continue
        yield f"the {kind} hook {getattr(hook, '__qualname__', type(hook).__name__)}"


def _checked_parameters(
    linear: nn.Linear | nn.Embedding,
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Returns weight and bias, each a parameter of a shape and dtype that a loss can be made of."""
    W, b = getattr(linear, "weight", None), getattr(linear, "bias", None)
    own = dict(linear.named_parameters(recurse=False))
    for name, x in (("weight", W), ("bias", b)):
        if isinstance(x, nn.Parameter) and x is not own.get(name):
            raise TypeError(
                f"linear must have its {name} as a parameter, but this {type(linear).__name__} "
                f"computes it (by a property, __getattr__ or the like); {_INSTEAD}"
            )
    if not isinstance(W, nn.Parameter) or W.dim() != 2 or len(W) == 0:
        shape = f" of shape {tuple(W.shape)}" if isinstance(W, Tensor) else ""
        raise TypeError(
            "linear must have a parameter `weight` of shape (num_classes, in_features) with at "
            f"least one class, got {type(W).__name__}{shape}"
        )
    dense("the weight of linear", W)
    if W.dtype not in FLOATING:
        raise TypeError(
            f"linear must have a weight of {', '.join(map(str, FLOATING))}, got {W.dtype}; "
            "dequantise or convert it first"
        )
    if b is None:
        return W, None
    if not isinstance(b, nn.Parameter) or b.shape != W.shape[:1]:
        shape = f" of shape {tuple(b.shape)}" if isinstance(b, Tensor) else ""
        raise TypeError(
            f"linear must have a parameter `bias` of shape ({len(W)},), as its weight has "
            f"{len(W)} rows, got {type(b).__name__}{shape}"
        )
    return W, b


class Tie:
    """A weak reference to the layer whose parameters an output layer shares.

    It keeps nothing alive. A deep copy of a model refers to the copied layer if that was copied
    before the output layer; a pickled one forgets the layer, although the parameters stay shared.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        self._layer = None if layer is None else weakref.ref(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tie:
        layer = None if self._layer is None else self._layer()
        return Tie(memo.get(id(layer)))

    def __reduce__(self) -> tuple[type[Tie], tuple[()]]:
        return Tie, ()

    def check(self, head: nn.Module) -> None:
        """Warns where the layer and the head no longer have the same parameters.

        It is a warning, since whoever replaces a parameter may mean to train the two apart.
        Tensors that torch.func.functional_call has put in place of parameters are not looked at.
        Neither is a head whose weight or bias is computed, by a parametrization or a hook before
        forward, nor a replica of nn.DataParallel, whose parameters are copies.
        """
        layer = None if self._layer is None else self._layer()
        if layer is None or transforms_active() or parametrize.is_parametrized(head):
            return
        if has_computed_weights(head) or getattr(head, "_is_replica", False):
            return
        owns, has = (dict(module.named_parameters(recurse=False)) for module in (head, layer))
        for name in ("weight", "bias"):
            own, theirs = owns.get(name), has.get(name)
            replaced = own is not theirs
            if replaced and all(x is None or isinstance(x, nn.Parameter) for x in (own, theirs)):
                warnings.warn(
                    f"the {name} of this {type(head).__name__} is no longer that of the "
                    f"{type(layer).__name__} from which it was made, since one of the two has been "
                    "replaced (by load_state_dict(assign=True), to_empty, a resized vocabulary or "
                    f"an assignment), and they will be trained apart. Tie them again with "
                    f"head.{name} = layer.{name}, or make a new output layer with from_linear",
                    stacklevel=3,
                )
