"""Criteria: drop-ins for `nn.CrossEntropyLoss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere.engines.row_statistics import wide_dtype
from softsphere.functional.base_measure import check_mask
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_logits import loss_on_logits
from softsphere.functional.probabilities import TopK, normalise, taylor
from softsphere.functional.with_prior import WithPrior

__all__ = [
    "SoftMarginSoftmaxLoss",
    "SphericalLoss",
    "SphericalSoftmaxLoss",
    "TaylorSoftmaxLoss",
    "TopK",
]


class SphericalLoss(WithPrior):
    """Any loss of the package as a criterion, with the arguments of `nn.CrossEntropyLoss`.

    criterion(input, target) is ℓ(o, t) of the outputs o = input of each row, reduced over the rows.
    The formula of ℓ and its source are in the docstring of the loss in `softsphere.losses`.

    Args:
        loss: a name of `softsphere.losses.REGISTRY`, or a loss such as `losses.ZLoss(a=1, b=2)`.
        weight: (C), class weights.
        ignore_index, reduction, label_smoothing: as in `softsphere.functional.spherical_loss`,
            which has the formulas and lists the errors.
        size_average, reduce: deprecated, as in `nn.CrossEntropyLoss`; use `reduction`.
        prior: (C), positive class frequencies or counts, which are the base measure π. The buffer
            `prior` holds them normalised to Σ π = C. It has no gradient.

    All but size_average and reduce can be read and assigned as attributes, and are checked again
    when they are used. A prior is checked and normalised when it is assigned.

    The soft margin of `losses.SoftMarginSoftmax` is used in training mode alone: after `.eval()`
    the loss is the true negative log-likelihood.

    Shapes: input (C), (N, C) or (N, C, d1, …), floating-point logits; target class indices or class
    probabilities; with target_values (N, K) also K-sparse targets (N, K).

    Do not mark classes that take no part by large negative logits, as is done with softmax. The
    losses of this package grow again there; pass a boolean `mask` instead.

    Raises ValueError or TypeError for invalid arguments. The message names the argument, the value
    received and a valid alternative.

    >>> criterion = SphericalLoss("z_loss")
    >>> criterion(torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([0]))
    tensor(2.6584)
    """

    weight: Tensor | None
    prior: Tensor | None

    def __init__(
        self,
        loss: str | losses.Loss,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | None = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        prior: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.loss = losses.get(loss)
        given = Conventions.checked(
            self.loss,
            weight=weight,
            pi=None if prior is None else checks.prior(prior),
            reduction=checks.reduction(reduction, size_average, reduce),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        if weight is not None and given.pi is not None:
            checks.class_vector("prior", given.pi, len(weight))
        self.register_buffer("weight", given.weight)
        self.register_buffer("prior", given.pi)
        self.reduction = given.reduction
        self.ignore_index = given.ignore_index
        self.label_smoothing = given.label_smoothing

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, losses.get(value) if name == "loss" else value)

    @property
    def conventions(self) -> Conventions:
        """The settings as they are now, checked."""
        return Conventions.checked(
            self.loss,
            weight=self.weight,
            pi=self.prior,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        target_values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of the logits `input` against `target`.

        Args:
            input: logits (C), (N, C) or (N, C, d1, …).
            target: class indices, shaped as the logits without their classes; or class
                probabilities, shaped as the logits; or K-sparse targets (N, K).
            target_values: (N, K), values of K-sparse targets (N, K).
            mask: boolean, True for classes that take part, (C) or of the shape of the logits.

        Returns a number, or with reduction "none" a loss for each row, shaped as class indices are,
        in the dtype of the logits. Raises what `softsphere.functional.spherical_loss` raises.
        """
        return loss_on_logits(
            input,
            target,
            self.active_loss(),
            self.conventions.masked(mask),
            target_values=target_values,
        )

    if TYPE_CHECKING:
        # nn.Module promises Any, which hides a wrong argument from a type checker
        def __call__(
            self,
            input: Tensor,
            target: Tensor,
            target_values: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> Tensor: ...

    def active_loss(self) -> losses.Loss:
        """The loss that `forward` computes: without a soft margin, except in training mode."""
        return self.loss if self.training else self.loss.plain

    def log_prob(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns log f_k, shaped as the logits, whose classes are where `forward` expects them.

        Args:
            input: logits (C), (N, C) or (N, C, d1, …).
            mask: as in `forward`. Classes that are masked out have log f_k = −∞.

        Half precision is computed in float32 and rounded once.

        Raises TypeError for a loss that is not a distribution.
        """
        dim = checks.logits_shape(input)
        result = normalise(torch.log_softmax, input, self.loss, dim, self.prior, mask)
        return result.to(input.dtype)

    def scores(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the scores by which classes are ranked, in float32 or wider.

        Args:
            input, mask: as in `log_prob`.

        These are log-probabilities, or the logits themselves for a loss that has none. They are −∞
        for classes that are masked out, and for a score that is NaN, which ranks last.
        """
        dim = checks.logits_shape(input)
        if self.loss.normalised:
            scores = normalise(torch.log_softmax, input, self.loss, dim, self.prior, mask)
        else:
            scores = input.to(wide_dtype(input.dtype))
            if mask is not None:
                kept = check_mask(mask, input, dim)
                scores = torch.where(kept, scores.movedim(dim, -1), -torch.inf).movedim(-1, dim)
        return torch.where(scores.isnan(), -torch.inf, scores)

    def predict(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the best class of each row, int64, shaped as the logits without their classes.

        Args:
            input, mask: as in `log_prob`.

        It need not have the largest logit, since t(o) need not be monotone.
        """
        return self.scores(input, mask).argmax(checks.logits_shape(input))

    def topk(self, input: Tensor, k: int, mask: Tensor | None = None) -> TopK:
        """Returns the k best classes of each row, best first, and their scores.

        Args:
            input, mask: as in `log_prob`.
            k: from 1 to C.

        Returns `TopK` of values and indices, with k in the place of C.

        Classes are ranked before the scores are rounded to the dtype of the logits.
        """
        dim = checks.logits_shape(input)
        k = checks.number_of_best("k", k, input.shape[dim])
        values, indices = torch.topk(self.scores(input, mask), k, dim=dim)
        return TopK(values.to(input.dtype), indices)

    def extra_repr(self) -> str:
        given = [name for name in ("weight", "prior") if getattr(self, name) is not None]
        return (
            f"{self.loss}, reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}" + "".join(f", {name}=…" for name in given)
        )


class TaylorSoftmaxLoss(SphericalLoss):
    """The negative logarithm of Taylor softmax of an even order n.

    ℓ = −log t(o_t) + log Σ_k π_k t(o_k) − log π_t, with t(o) = Σ_{i≤n} oⁱ / i! > 0. Order 2,
    t(o) = 1 + o + o²/2, is a spherical loss and the cheapest.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing, prior: as in
            `SphericalLoss`.
        order: n, even, from 2 to 20.

    Raises what `SphericalLoss` raises, and ValueError for another order.

    Source: de Brébisson & Vincent 2015, arXiv:1511.05042 (order 2); Banerjee et al. 2020,
    arXiv:2011.11538 (higher orders).

    >>> TaylorSoftmaxLoss()(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor(0.4700)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | None = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        order: int = 2,
        prior: Tensor | None = None,
    ) -> None:
        super().__init__(
            taylor(order),
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            prior=prior,
        )


class SphericalSoftmaxLoss(SphericalLoss):
    """The negative logarithm of the spherical softmax.

    ℓ = −log (o_t² + ε) + log Σ_k π_k (o_k² + ε) − log π_t.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing, prior: as in
            `SphericalLoss`.
        eps: ε > 0.

    Raises what `SphericalLoss` raises, and ValueError for an ε that is not positive.

    Source: de Brébisson & Vincent 2015, arXiv:1511.05042.

    >>> SphericalSoftmaxLoss(eps=0.5)(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor(0.8473)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | None = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        eps: float = 1.0,
        prior: Tensor | None = None,
    ) -> None:
        super().__init__(
            losses.SphericalSoftmax(eps),
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            prior=prior,
        )


class SoftMarginSoftmaxLoss(SphericalLoss):
    """Softmax, or Taylor softmax of an even order, whose target must win by a margin m ≥ 0.

    ℓ = log (π_t t(o_t − m) + Σ_{k≠t} π_k t(o_k)) − log π_t − log t(o_t − m), with t = exp or the
    polynomial of `TaylorSoftmaxLoss`. The margin is used in training mode alone. After `.eval()`
    the loss is that of m = 0, the true negative log-likelihood.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing, prior: as in
            `SphericalLoss`.
        margin: m.
        order: of the Taylor softmax; None for softmax.

    Raises what `SphericalLoss` raises, and ValueError for a negative margin or another order.

    Source: Banerjee et al. 2020, arXiv:2011.11538.

    >>> SoftMarginSoftmaxLoss(margin=1.0).eval()(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | None = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        margin: float = 1.0,
        order: int | None = None,
        prior: Tensor | None = None,
    ) -> None:
        super().__init__(
            losses.SoftMarginSoftmax(margin, order),
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            prior=prior,
        )
