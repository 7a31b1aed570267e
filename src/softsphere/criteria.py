"""Criteria: drop-ins for `nn.CrossEntropyLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_logits import log_prob_checked, loss_on_logits, taylor

__all__ = [
    "SoftMarginSoftmaxLoss",
    "SphericalLoss",
    "SphericalSoftmaxLoss",
    "TaylorSoftmaxLoss",
    "TopK",
]


class TopK(NamedTuple):
    """As `torch.topk` returns them; values are log-probabilities where the loss has them."""

    values: Tensor
    indices: Tensor


class WithPrior(nn.Module):
    """A module whose buffer `prior`, normalised to Σ π = D, is float32 or wider at all times."""

    prior: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithPrior:
        before = self.prior
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.prior is not None:
            if self.prior.dtype in (torch.float16, torch.bfloat16):
                self.prior = before.to(self.prior.device)
            elif self.prior.dtype == torch.float64 != before.dtype and not self.prior.is_meta:
                # what float32 had rounded would stay so
                self.prior = checks.prior(self.prior)
        return self


class SphericalLoss(WithPrior):
    """Any loss of the package as a criterion, with the arguments of `nn.CrossEntropyLoss`.

    Args:
        loss: a name of `softsphere.losses.REGISTRY`, or a loss such as `losses.ZLoss(a=1, b=2)`.
        weight: (C) class weights.
        prior: (C) positive class frequencies or counts, the base measure π; kept normalised to
            Σ π = C.
        reduction, ignore_index, label_smoothing: as in `softsphere.functional.spherical_loss`,
            which has the formulas and what is raised.

    Shapes: logits (C), (N, C) or (N, C, d1, …); target class indices or class probabilities; with
    target_values (N, K) also K-sparse targets (N, K).

    >>> criterion = SphericalLoss("z_loss")
    >>> criterion(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]))
    tensor(2.6584)
    """

    weight: Tensor | None
    prior: Tensor | None

    def __init__(
        self,
        loss: str | losses.Loss,
        *,
        weight: Tensor | None = None,
        prior: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.loss = losses.get(loss)
        given = Conventions.checked(
            self.loss,
            weight=weight,
            pi=None if prior is None else checks.prior(prior),
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        self.register_buffer("weight", given.weight)
        self.register_buffer("prior", given.pi)
        self.reduction = given.reduction
        self.ignore_index = given.ignore_index
        self.label_smoothing = given.label_smoothing

    @property
    def conventions(self) -> Conventions:
        """The attributes, checked as they are now."""
        return Conventions.checked(
            self.loss,
            weight=self.weight,
            pi=self.prior,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def forward(
        self, logits: Tensor, target: Tensor, target_values: Tensor | None = None
    ) -> Tensor:
        """The loss of logits against target."""
        return loss_on_logits(
            logits, target, self.active_loss(), self.conventions, target_values=target_values
        )

    def active_loss(self) -> losses.Loss:
        """The loss that forward computes."""
        return self.loss

    def log_prob(self, logits: Tensor) -> Tensor:
        """log f_k, shaped as logits, classes where forward expects them.

        Raises: TypeError for a loss that is not a distribution.
        """
        dim = checks.logits_shape(logits)
        return log_prob_checked(logits, self.loss, dim, self.prior)

    def scores(self, logits: Tensor) -> Tensor:
        """What ranks the classes: log-probabilities, or the outputs of a loss without them."""
        return self.log_prob(logits) if self.loss.normalised else logits

    def predict(self, logits: Tensor) -> Tensor:
        """The best class of each row. Not always the largest output: t(o) need not be monotone."""
        return self.scores(logits).argmax(checks.logits_shape(logits))

    def topk(self, logits: Tensor, k: int) -> TopK:
        """The k best classes of each row, best first."""
        return TopK(*torch.topk(self.scores(logits), k, dim=checks.logits_shape(logits)))

    def extra_repr(self) -> str:
        given = [name for name in ("weight", "prior") if getattr(self, name) is not None]
        return (
            f"{self.loss}, reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}" + "".join(f", {name}=…" for name in given)
        )


class TaylorSoftmaxLoss(SphericalLoss):
    """Log-Taylor softmax of even order; 2 is spherical and the cheapest.

    >>> TaylorSoftmaxLoss()(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor(0.4700)
    """

    def __init__(
        self,
        order: int = 2,
        *,
        weight: Tensor | None = None,
        prior: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            taylor(order),
            weight=weight,
            prior=prior,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )


class SphericalSoftmaxLoss(SphericalLoss):
    """Log-spherical softmax with ε > 0.

    >>> SphericalSoftmaxLoss(eps=0.5)(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor(0.8473)
    """

    def __init__(
        self,
        eps: float = 1.0,
        *,
        weight: Tensor | None = None,
        prior: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            losses.SphericalSoftmax(eps),
            weight=weight,
            prior=prior,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )


class SoftMarginSoftmaxLoss(SphericalLoss):
    """Softmax (or Taylor softmax of an even order) whose target must win by a margin m ≥ 0.

    The margin is for training: after `.eval()` the loss is that of m = 0, the true likelihood.

    >>> SoftMarginSoftmaxLoss(margin=1.0).eval()(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """

    def __init__(
        self,
        margin: float = 1.0,
        order: int | None = None,
        *,
        weight: Tensor | None = None,
        prior: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(
            losses.SoftMarginSoftmax(margin, order),
            weight=weight,
            prior=prior,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def active_loss(self) -> losses.Loss:
        if self.training or not isinstance(self.loss, losses.SoftMarginSoftmax):
            return self.loss
        return self.loss.plain
