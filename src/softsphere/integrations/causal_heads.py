"""Output layers that stand where a language model has its `lm_head`, a linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softsphere import losses
from softsphere.functional.conventions import mixed_precision
from softsphere.heads import ClusteredLoss, FactoredSphericalLoss, LinearSphericalLoss
from softsphere.heads.prediction import OutputLayer

__all__ = ["IGNORED", "CausalHead", "as_causal_head", "causal_lm_loss", "check_causal"]

# What transformers has as the label of a token that is not predicted.
IGNORED = -100


class CausalHead(OutputLayer):
    """An output layer that a model may call with hidden states alone.

    head(hidden, target) is the loss, as of every output layer. head(hidden) is the log-probability
    of every token, or hidden itself inside `passing`.
    """

    passes: bool
    reduction: str
    weight: nn.Parameter

    @contextmanager
    def passing(self) -> Iterator[None]:
        """head(hidden) returns hidden as it came."""
        self.passes = True
        try:
            yield
        finally:
            self.passes = False

    def forward(self, hidden: Tensor, target: Tensor | None = None, *rest: Any) -> Tensor:
        if target is not None:
            loss: Tensor = super().forward(hidden, target, *rest)
            return loss
        return hidden if self.passes else self.log_prob(_fitting(hidden, self))

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


class CausalLinear(CausalHead, LinearSphericalLoss):
    """A LinearSphericalLoss in a language model."""


class CausalClustered(CausalHead, ClusteredLoss):
    """A ClusteredLoss in a language model."""


class CausalFactored(CausalHead, FactoredSphericalLoss):
    """A FactoredSphericalLoss in a language model."""


_CAUSAL: dict[type[OutputLayer], type[CausalHead]] = {
    LinearSphericalLoss: CausalLinear,
    ClusteredLoss: CausalClustered,
    FactoredSphericalLoss: CausalFactored,
}


def check_causal(head: Any) -> None:
    """Raises TypeError or ValueError for an output layer that a language model cannot have."""
    if type(head) not in _CAUSAL:
        known = ", ".join(kind.__name__ for kind in _CAUSAL)
        raise TypeError(
            f"head must be the name of a loss, a loss, or one of {known}, got {type(head).__name__}"
        )
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
    if head.ignore_index != IGNORED:
        raise ValueError(
            f"head must have ignore_index={IGNORED}, the label that transformers gives to tokens "
            f"without a loss, got {head.ignore_index}"
        )


def as_causal_head(head: OutputLayer) -> CausalHead:
    """Lets a model call this output layer with hidden states alone.

    It is the same object with the same parameters afterwards.
    """
    head.__class__ = _CAUSAL[type(head)]
    assert isinstance(head, CausalHead)
    head.passes = False
    return head


def causal_lm_loss(
    head: CausalHead,
    hidden: Tensor,
    labels: Tensor | None,
    num_items: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """The loss of the next tokens, in float32 or wider, as `ForCausalLMLoss` defines it.

    Args:
        head: the output layer.
        hidden: (…, n, d).
        labels: (…, n), the tokens themselves, or −100; the label after a token is its target.
        num_items: what the sum is divided by; None for the number of targets in this batch.
        shift_labels: (…, n), targets that are shifted already, instead of labels.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    target = shift_labels.to(hidden.device)
    if num_items is None:
        return _in_wide_digits(head, hidden, target)
    mean = head.reduction
    head.reduction = "sum"
    try:
        total = _in_wide_digits(head, hidden, target)
    finally:
        head.reduction = mean
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
