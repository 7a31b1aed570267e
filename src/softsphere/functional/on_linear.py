"""The losses of a linear output layer, without its logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere.engines import LinearSphericalOptions, options_or_default
from softsphere.engines.dispatch import linear_statistics
from softsphere.engines.weight import accumulator
from softsphere.functional.conventions import Conventions, mixed_precision
from softsphere.functional.on_logits import loss_on_logits, spherical_value
from softsphere.stats import Stats

__all__ = ["Affine", "linear_spherical_loss", "loss_on_linear", "without_logits"]

# The statistics of rows H (m, d) for targets (m, K).
Statistics = Callable[[Tensor, Tensor], Stats]


class Affine(NamedTuple):
    """W (D, d) and b (D) of a linear layer, and what errors call its rows, W and b."""

    weight: Tensor
    bias: Tensor | None
    names: tuple[str, str, str] = checks.LINEAR_NAMES


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
    ignore_index: int | None = -100,
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
    kind = losses.get(loss)
    conventions = Conventions.checked(
        kind,
        weight=weight,
        pi=None if prior is None else checks.prior(prior),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss_on_linear(
        input,
        Affine(linear_weight, linear_bias),
        target,
        kind,
        conventions,
        target_values=target_values,
        options=options_or_default(options),
    )


def loss_on_linear(
    input: Tensor,
    layer: Affine,
    target: Any,
    loss: losses.Loss,
    conventions: Conventions,
    *,
    target_values: Tensor | None,
    options: LinearSphericalOptions,
    statistics: Statistics | None = None,
) -> Tensor:
    """`linear_spherical_loss` with conventions that are checked already.

    statistics: used in place of an engine, by a caller that keeps something between calls.
    """
    W, b, names = layer
    checks.linear(input, W, b, names)
    num_classes, leading = len(W), input.shape[:-1]
    soft = target_values is None and isinstance(target, Tensor) and target.is_floating_point()
    if target_values is not None:
        checks.sparse_rows(leading, target, target_values)
    elif soft:
        checks.probability_rows((*leading, num_classes), target)
    else:
        checks.rows_target(leading, target, names[0])
    refusal = without_logits(loss, conventions.label_smoothing, soft)
    if refusal and (statistics or options.engine not in ("auto", "dense")):
        raise refusal
    m = math.prod(leading)
    H = input.reshape(m, W.shape[1])
    if statistics is None:
        H, W, b = autocast(H), autocast(W), None if b is None else autocast(b)
    if statistics is None or not mixed_precision(H):
        checks.same_dtype(H, W, b, names)
    target = target.reshape(m, *target.shape[len(leading) :])
    values = None if target_values is None else target_values.reshape(target.shape)
    if refusal:
        o = torch.nn.functional.linear(H, W, b)
        result = loss_on_logits(o, target, loss, conventions, target_values=values)
        return result.view(leading) if conventions.reduction == "none" else result
    dtype = accumulator(H, W, options.accumulate_dtype)
    conventions = conventions.fit(num_classes, dtype, H)
    entries = conventions.entries(target, values, num_classes, dtype)
    assert isinstance(loss, losses.Spherical)
    if statistics is None:
        centred = loss.shift_invariant
        x = linear_statistics(H, W, b, entries.t, conventions.pi, centred=centred, options=options)
    else:
        x = statistics(H, entries.t)
    rows = entries.weigh(spherical_value(loss, x, entries, conventions))
    return conventions.finish(rows.view(leading), entries.counted, input)


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
