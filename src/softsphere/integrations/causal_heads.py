"""Output layers that stand where a language model has its `lm_head`, a linear layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from softsphere import losses
from softsphere._torch import values_on_cpu
from softsphere.functional.conventions import mixed_precision
from softsphere.heads import ClusteredLoss, FactoredSphericalLoss, LinearSphericalLoss
from softsphere.heads.prediction import OutputLayer

__all__ = [
    "CausalHead",
    "as_causal_head",
    "causal_lm_loss",
    "check_causal",
    "check_conventions",
    "plain_twin",
]

# What transformers has as the label of a token that is not predicted.
_IGNORED = -100


class _Calls(threading.local):
    """What this thread asks of an output layer besides the arguments of its calls.

    A model may be called by several threads at once. It is not a ContextVar, which the compiler of
    PyTorch cannot trace.
    """

    def __init__(self) -> None:
        # Once in each thread. The compiler does not see defaults that are attributes of the class.
        self.passing: CausalHead | None = None
        self.summing: CausalHead | None = None


_calls = _Calls()


class CausalHead(OutputLayer):
    """An output layer that a model may call with hidden states alone.

    head(hidden, target) is the loss, as of every output layer. head(hidden) is the log-probability
    of every token, or hidden itself inside `passing`.

    Each subclass has the name of the output layer from which it derives, since users know that one.
    """

    public: ClassVar[type[OutputLayer]]
    weight: nn.Parameter
    _own_reduction: str

    def __init_subclass__(cls) -> None:
        cls.public = public = cls.__bases__[1]
        cls.__name__, cls.__qualname__ = public.__name__, public.__qualname__
        cls.__module__ = public.__module__

    @property
    def reduction(self) -> str:
        """That of the output layer, or "sum" inside `summing`."""
        return "sum" if _calls.summing is self else self._own_reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        self._own_reduction = value

    @contextmanager
    def passing(self) -> Iterator[None]:
        """head(hidden) returns hidden as it came, in this thread."""
        before, _calls.passing = _calls.passing, self
        try:
            yield
        finally:
            _calls.passing = before

    @contextmanager
    def summing(self) -> Iterator[None]:
        """head(hidden, target) returns the sum of the losses, in this thread."""
        before, _calls.summing = _calls.summing, self
        try:
            yield
        finally:
            _calls.summing = before

    def forward(
        self, hidden: Tensor, target: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        if target is not None:
            loss: Tensor = super().forward(hidden, target, *rest, **options)
            return loss
        return hidden if _calls.passing is self else self.log_prob(_fitting(hidden, self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle finds the public class where it looks for one of this name.
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced
        return (_without_state, (self.public,), *rest)

    if TYPE_CHECKING:
        # as `forward` takes them: the target may be missing
        def __call__(
            self,
            hidden: Tensor,
            target: Tensor | None = None,
            target_values: Tensor | None = None,
            mask: Tensor | None = None,
            num_items: float | Tensor | None = None,
        ) -> Tensor: ...


class _CausalLinear(CausalHead, LinearSphericalLoss):
    """A LinearSphericalLoss in a language model."""


class _CausalClustered(CausalHead, ClusteredLoss):
    """A ClusteredLoss in a language model."""


class _CausalFactored(CausalHead, FactoredSphericalLoss):
    """A FactoredSphericalLoss in a language model."""


_CAUSAL: dict[type[OutputLayer], type[CausalHead]] = {
    kind.public: kind for kind in (_CausalLinear, _CausalClustered, _CausalFactored)
}
_KNOWN = ", ".join(kind.__name__ for kind in _CAUSAL)


def _without_state(public: type[OutputLayer]) -> CausalHead:
    """An output layer without a state, for pickle and copy."""
    kind = _CAUSAL[public]
    return kind.__new__(kind)


def check_causal(head: Any) -> None:
    """Raises TypeError or ValueError for an output layer that a language model cannot have."""
    if isinstance(head, CausalHead):
        raise TypeError(
            f"head must be an output layer that no model has yet, but this {type(head).__name__} "
            "is the lm_head of one already; make a new one, and load the state_dict() of this one "
            "into it if it is to begin with the same numbers"
        )
    if isinstance(head, type):
        raise TypeError(
            f"head must be the name of a loss, a loss, or one of {_KNOWN}, got the class "
            f"{head.__name__} itself; make an object of it first"
        )
    if type(head) not in _CAUSAL:
        raise TypeError(
            f"head must be the name of a loss, a loss, or one of {_KNOWN}, got "
            f"{type(head).__name__}"
        )
    if getattr(head, "shards", None) is not None:
        raise ValueError(
            "head must have no process_group, since the model saves and loads the rows of one "
            "process; make the head without it"
        )
    check_conventions(head)


def check_conventions(head: Any) -> None:
    """Raises TypeError or ValueError for a loss or a convention that a language model cannot have.

    These are attributes of the head, which can be set at any time.
    """
    if not head.loss.normalised:
        known = ", ".join(name for name, kind in losses.REGISTRY.items() if kind.normalised)
        raise TypeError(
            f"head must have a loss that is a distribution, since a language model gives "
            f"probabilities of tokens, got {head.loss}; use one of {known}"
        )
    if head.reduction != "mean":
        raise ValueError(
            f"head must have reduction='mean', got {head.reduction!r}; the model divides the sum "
            "by num_items_in_batch where a trainer gives it"
        )
    if head.ignore_index != _IGNORED:
        raise ValueError(
            f"head must have ignore_index={_IGNORED}, the label that transformers gives to tokens "
            f"without a loss, got {head.ignore_index}"
        )


def as_causal_head(head: OutputLayer) -> CausalHead:
    """Lets a model call this output layer with hidden states alone.

    It is the same object with the same parameters afterwards.
    """
    reduction = vars(head).pop("reduction")  # a property from here on
    head.__class__ = _CAUSAL[type(head)]
    assert isinstance(head, CausalHead)
    head.reduction = reduction
    return head


def plain_twin(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A plain linear layer of these parameters."""
    linear: Any = nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias
    linear.out_features, linear.in_features = weight.shape
    twin: nn.Linear = linear
    return twin


def causal_lm_loss(
    head: CausalHead,
    hidden: Tensor,
    labels: Tensor | None,
    num_items: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = _IGNORED,
) -> Tensor:
    """The loss of the next tokens, in float32 or wider, as `ForCausalLMLoss` defines it.

    Args:
        head: the output layer.
        hidden: (…, n, d).
        labels: (…, n), the tokens themselves, or ignore_index; the label after a token is its
            target.
        num_items: what the sum is divided by; None for the number of targets in this batch.
        shift_labels: (…, n), targets that are shifted already, instead of labels.
        ignore_index: the label of a token that has no loss.

    Raises ValueError for labels that do not fit hidden.
    """
    name = "labels" if shift_labels is None else "shift_labels"
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape {tuple(hidden.shape[:-1])} of the tokens that the model "
            f"has outputs for, got {tuple(shift_labels.shape)}; a call with labels needs the "
            "outputs of all tokens, so leave logits_to_keep 0"
        )
    target = shift_labels.to(hidden.device)
    if ignore_index != _IGNORED:
        # The layer ignores −100 alone, which is now the label of no class, such as −1.
        ignored, unknown = target == ignore_index, target == _IGNORED
        if values_on_cpu(target) and bool(unknown.any()):
            raise ValueError(
                f"{name} must be in [0, {head.num_classes}) or ignore_index = {ignore_index}, got "
                f"{_IGNORED}"
            )
        target = target.masked_fill(unknown, -1).masked_fill(ignored, _IGNORED)
    if num_items is None:
        return _in_wide_digits(head, hidden, target)
    with head.summing():
        total = _in_wide_digits(head, hidden, target)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _in_wide_digits(head: CausalHead, hidden: Tensor, target: Tensor) -> Tensor:
    """head(hidden, target), which autocast leaves in float32 where hidden has half precision."""
    hidden = _fitting(hidden, head)
    if hidden.dtype not in (torch.float16, torch.bfloat16) or mixed_precision(hidden):
        loss: Tensor = head(hidden, target)
        return loss
    with torch.autocast(hidden.device.type, hidden.dtype):
        loss = head(hidden, target)
    return loss


def _fitting(hidden: Tensor, head: CausalHead) -> Tensor:
    """Hidden states in the dtype of the weight; autocast sees to that itself."""
    return hidden if mixed_precision(hidden) else hidden.to(head.weight.dtype)
