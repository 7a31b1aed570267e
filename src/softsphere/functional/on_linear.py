"""The losses of a linear output layer, without its logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere.engines import LinearSphericalOptions, options_or_default
from softsphere.engines import dispatch as linear
from softsphere.engines.weight import accumulator
from softsphere.functional.conventions import (
    check_options,
    counts,
    finish,
    mixed_precision,
    refuse_weight,
)
from softsphere.functional.on_logits import loss_on_logits
from softsphere.stats import Stats
from softsphere.targets import from_sparse

__all__ = ["linear_spherical_loss", "loss_on_linear"]

# Statistics of rows H (m, d) for targets (m, K), from who knows W, b, π and the loss.
Statistics = Callable[[Tensor, Tensor], Stats]


def linear_spherical_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss: str | losses.Loss,
    *,
    linear_bias: Tensor | None = None,
    target_values: Tensor | None = None,
    weight: Tensor | None = None,
    prior: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    options: LinearSphericalOptions | None = None,
) -> Tensor:
    r"""ℓ(W h + b, t): `spherical_loss(F.linear(input, W, b), target, …)` without the logits.

    Args:
        input: (…, d), floating-point, the rows h.
        linear_weight: W (D, d).
        target: class indices (…), one a row; (…, K) with target_values; or class probabilities
            (…, D), which need engine "dense".
        loss: a name of `softsphere.losses.REGISTRY`, or a loss; only the spherical ones can do
            without the logits.
        linear_bias: b (D).
        target_values, weight, prior, reduction, ignore_index: as in `spherical_loss`; `weight` is
            class weights.
        label_smoothing: as there; needs engine "dense".
        options: which engine, and how; None is `LinearSphericalOptions()`.

    Under autocast input, weight and bias are cast as `F.linear` casts them, and the statistics and
    the loss are float32. There is no second derivative but by engine "dense".

    Raises: ValueError or TypeError that names the argument, what came and what would do; where an
    engine was named that cannot do what is asked, which can.

    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; Krichene et al. 2018,
    arXiv:1807.07187 (the Gram identity).

    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> linear_spherical_loss(torch.tensor([[1.0, 0.0]]), W, torch.tensor([0]), "taylor_softmax")
    tensor(0.4700)
    """
    pi = None if prior is None else checks.prior(prior)
    return loss_on_linear(
        input,
        linear_weight,
        target,
        losses.get(loss),
        b=linear_bias,
        target_values=target_values,
        weight=weight,
        pi=pi,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        options=options_or_default(options),
    )


def loss_on_linear(
    input: Tensor,
    W: Tensor,
    target: Any,
    loss: losses.Loss,
    *,
    b: Tensor | None,
    target_values: Tensor | None,
    weight: Tensor | None,
    pi: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    options: LinearSphericalOptions,
    statistics: Statistics | None = None,
) -> Tensor:
    """`linear_spherical_loss` for a prior that is checked and normalised already.

    statistics: instead of an engine's, from who keeps something between calls.
    """
    check_options(loss, reduction, ignore_index, label_smoothing)
    checks.linear(input, W, b)
    for name, vector in (("weight", weight), ("prior", pi)):
        if vector is not None:
            checks.class_vector(name, vector, len(W))
    leading = input.shape[:-1]
    soft = target_values is None and isinstance(target, Tensor) and target.is_floating_point()
    if target_values is not None:
        checks.sparse_rows(leading, target, target_values)
    elif soft:
        checks.probability_rows((*leading, len(W)), target)
    else:
        checks.rows_target(leading, target, "input")
    refusal = without_logits(loss, label_smoothing, soft)
    if refusal and (statistics or options.engine not in ("auto", "dense")):
        raise refusal
    m = math.prod(leading)
    H = input.reshape(m, W.shape[1])
    if statistics is None:
        H, W, b = autocast(H), autocast(W), None if b is None else autocast(b)
    if statistics is None or not mixed_precision(H):
        checks.same_dtype(H, W, b)
    target = target.reshape(m, *target.shape[len(leading) :])
    values = None if target_values is None else target_values.reshape(target.shape)
    if refusal:
        rows = loss_on_logits(
            torch.nn.functional.linear(H, W, b),
            target,
            loss,
            target_values=values,
            weight=weight,
            pi=pi,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        return rows.view(leading) if reduction == "none" else rows
    dtype = accumulator(H, W, options.accumulate_dtype)
    w, pi = None if weight is None else weight.to(dtype), None if pi is None else pi.to(dtype)
    assert isinstance(loss, losses.Spherical)
    centred = loss.shift_invariant

    def of_weight(H: Tensor, t: Tensor) -> Stats:
        return linear.statistics(H, W, b, t, pi, centred=centred, options=options)

    find = partial(statistics or of_weight, H)
    num_classes = len(W)
    if values is None:
        rows, counted = indexed(target, loss, find, num_classes, ignore_index, w, dtype)
    else:
        values = values.to(dtype)
        rows, counted = sparse(target, values, loss, find, num_classes, ignore_index, w)
    return finish(rows.view(leading), counted, reduction, input)


def indexed(
    target: Tensor,
    loss: losses.Spherical,
    statistics: Callable[[Tensor], Stats],
    num_classes: int,
    ignore_index: int,
    w: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Losses (m) of class indices (m), and what each row counts for."""
    t, own, ignored, counted = counts(target, num_classes, ignore_index, w, dtype)
    rows = own * loss.value(statistics(t.unsqueeze(1)))
    return torch.where(ignored, 0.0, rows), counted


def sparse(
    target: Tensor,
    values: Tensor,
    loss: losses.Spherical,
    statistics: Callable[[Tensor], Stats],
    num_classes: int,
    ignore_index: int,
    w: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses (m) of K-sparse targets (m, K) with values, and which rows count."""
    if isinstance(loss, losses.SquaredError):
        refuse_weight(w)
    entries = from_sparse(target, values, num_classes, ignore_index, w)
    x = statistics(entries.t)
    rows = loss.value(Stats(x.s, x.q, x.c, x.mass, y=entries.y, pi=x.pi))
    return torch.where(entries.ignored, 0.0, rows), (~entries.ignored).to(values.dtype)


def without_logits(loss: losses.Loss, label_smoothing: float, soft: bool) -> Exception | None:
    """Why this cannot do without the logits, as what to raise for it."""
    if not isinstance(loss, losses.Spherical):
        return TypeError(
            f"loss must be spherical for an engine without logits, got {loss}; "
            "only engine='dense' (or 'auto') can do with this one"
        )
    if label_smoothing:
        return ValueError(
            f"label_smoothing needs the logits, got {label_smoothing}; leave it 0, "
            "or use engine='dense' (or 'auto')"
        )
    if soft:
        return ValueError(
            "target of class probabilities needs the logits; give class indices, K-sparse ones "
            "with target_values, or use engine='dense' (or 'auto')"
        )
    return None


def autocast(x: Tensor) -> Tensor:
    """x as autocast gives it to `F.linear`."""
    if x.dtype == torch.float64 or not mixed_precision(x):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
