"""The losses of a linear output layer, without its logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere._torch import values_on_cpu
from softsphere.engines.dispatch import linear_statistics
from softsphere.engines.options import LinearSphericalOptions, options_or_default
from softsphere.engines.weight import sum_dtype
from softsphere.functional.base_measure import (
    BaseMeasure,
    check_mask_of_all_rows,
    restrict,
)
from softsphere.functional.conventions import Conventions, mixed_precision, multiplied_dtype
from softsphere.functional.on_logits import (
    LOST_DIGITS,
    loss_on_logits,
    lost_digits,
    spherical_value,
)
from softsphere.stats import Stats

__all__ = [
    "Affine",
    "autocast",
    "linear_spherical_loss",
    "loss_on_linear",
    "outside_of_accumulate",
    "without_logits",
]

# The statistics of rows H (m, d) for targets (m, K).
Statistics = Callable[[Tensor, Tensor], Stats]


class Affine(NamedTuple):
    """W (D, d) and b (D) of a linear layer, and the names of its rows, W and b in errors."""

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
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    prior: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    options: LinearSphericalOptions | None = None,
) -> Tensor:
    r"""Computes ℓ(W h + b, t): `spherical_loss` of a linear layer, without its logits.

    Args:
        input: (…, d), the rows h, in a floating-point dtype.
        linear_weight: (D, d), W. With (C, d1, …, dK, d) and an input (N, d) it is a K-dimensional
            loss as in `F.linear_cross_entropy`: the logits have the shape (N, C, d1, …, dK), and
            the target that of `spherical_loss`. This needs the logits.
        target: class indices (…), one for each row; (…, K) with target_values; or class
            probabilities (…, D), which need the logits.
        loss: a name of `softsphere.losses.REGISTRY`, or a loss. One that is not spherical needs the
            logits.
        linear_bias: (D), b; or (C, d1, …, dK).
        mask: (D), boolean, True for classes that take part. The others are left out as if they
            were not there. Their rows of W and entries of b may hold anything, such as a bias of
            −∞, and their gradient is 0.
        target_values, weight, prior, reduction, ignore_index: as in `spherical_loss`. `weight` is
            the class weights.
        label_smoothing: as in `spherical_loss`. It needs the logits.
        options: which engine computes the loss, and how; None means `LinearSphericalOptions()`.

    What needs the logits is computed by the engine "dense", or by "auto". Under autocast, input,
    weight and bias are cast as `F.linear` casts them, and the statistics and the loss are float32.
    Only the engine "dense" has second derivatives.

    Returns a number, or (…) with reduction "none".

    Raises ValueError or TypeError for invalid arguments. The message names the argument, the value
    received and a valid alternative. If the named engine cannot compute the loss, it names an
    engine that can.

    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; Krichene et al. 2018,
    arXiv:1807.07187 (the Gram identity).

    >>> W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> linear_spherical_loss(torch.tensor([[1.0, 0.0]]), W, torch.tensor([0]), "taylor_softmax")
    tensor(0.4700)
    """
    kind, chosen = losses.get(loss), options_or_default(options)
    conventions = Conventions.checked(
        kind,
        weight=weight,
        pi=None if prior is None else checks.prior(prior, waits=False),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mask=mask,
    )
    layer = Affine(linear_weight, linear_bias)
    checks.floating("linear_weight", linear_weight)
    if linear_weight.dim() > 2:
        o = _K_dimensional_logits(input, layer, chosen)
        return loss_on_logits(o, target, kind, conventions, target_values=target_values)
    return loss_on_linear(
        input, layer, target, kind, conventions, target_values=target_values, options=chosen
    )


def loss_on_linear(
    input: Tensor,
    layer: Affine,
    target: Any,
    loss: losses.Loss,
    conventions: Conventions,
    *,
    target_values: Any,
    options: LinearSphericalOptions,
    statistics: Statistics | None = None,
) -> Tensor:
    """`linear_spherical_loss` with conventions that are checked already.

    statistics: takes the place of an engine, for a caller that keeps something between calls.
    """
    W, b, names = layer
    checks.linear(input, W, b, names)
    num_classes, leading = len(W), input.shape[:-1]
    soft = _check_target(input, num_classes, target, target_values, names[0])
    mask = conventions.mask
    if mask is not None:
        mask = check_mask_of_all_rows(mask, num_classes, names[0], input)
        W, b = _masked(W, b, mask, statistics)
    refusal = without_logits(loss, conventions.label_smoothing, soft)
    if refusal and statistics:
        raise outside_of_accumulate(refusal)
    if refusal and options.engine not in ("auto", "dense"):
        raise refusal
    m = math.prod(leading)
    H = input.reshape(m, W.shape[1])
    if statistics is None:
        H, W, b = autocast(H), autocast(W), None if b is None else autocast(b)
    if statistics is None or not mixed_precision(H):
        checks.same_dtype(H, W, b, names)
    target = target.reshape(m, *target.shape[len(leading) :])
    values = None if target_values is None else target_values.reshape(target.shape)
    if refusal or (values is not None and _by_squares(loss, options)):
        if not refusal and b is not None:
            _refuse_infinite_bias(b, b, names[2])
        o = torch.nn.functional.linear(H, W, b)
        result = loss_on_logits(o, target, loss, conventions, target_values=values)
        return result.view(leading) if conventions.reduction == "none" else result
    dtype = sum_dtype(H, W, options.accumulate_dtype)
    conventions = conventions.fit(num_classes, dtype, H)
    entries = conventions.entries(target, values, num_classes, dtype)
    base = BaseMeasure(conventions.pi)
    if mask is not None:
        base = restrict(conventions.pi, mask, dtype)
        entries.refuse_masked(mask)
    assert isinstance(loss, losses.Spherical)

    def by_engine(options: LinearSphericalOptions) -> Stats:
        centred, mass = loss.shift_invariant, base.mass
        given = H, W, b, entries.t, base.pi
        return linear_statistics(*given, centred=centred, options=options, mass=mass)

    x = by_engine(options) if statistics is None else statistics(H, entries.t)
    careful = options.engine in ("auto", "dense")
    value = spherical_value(loss, x, entries, conventions, warns=not careful)
    if careful and lost_digits(loss, x, entries, value):
        if statistics is not None:
            raise RuntimeError(f"{LOST_DIGITS}, or accumulate without this context")
        x = by_engine(replace(options, accumulate_dtype=torch.float64))
        value = spherical_value(loss, x, entries, conventions).to(value.dtype)
    rows = entries.weigh(value)
    _refuse_infinite_bias(rows, b, names[2])
    return conventions.finish(rows.view(leading), entries.counted, input)


def _by_squares(loss: losses.Loss, options: LinearSphericalOptions) -> bool:
    """Whether a K-sparse loss sums the squares of logits, since statistics may lose its digits."""
    logits = options.engine == "dense" and options.accumulate_dtype == torch.float32
    return logits and isinstance(loss, losses.SquaredError)


def _check_target(input: Tensor, num_classes: int, target: Any, values: Any, name: str) -> bool:
    """Whether the target holds class probabilities, after its checks."""
    leading = input.shape[:-1]
    for argument, x in (("target", target), ("target_values", values)):
        checks.same_device(argument, x, name, input)
    if values is not None:
        checks.sparse_rows(leading, target, values)
        return False
    if isinstance(target, Tensor) and target.is_floating_point():
        checks.probability_rows((*leading, num_classes), target)
        return True
    checks.rows_target(leading, target, name)
    return False


def _refuse_infinite_bias(rows: Tensor, b: Tensor | None, name: str) -> None:
    """Raises ValueError if a bias such as −∞ is why losses are not finite, on a CPU."""
    if b is not None and values_on_cpu(rows) and not bool(rows.isfinite().all()):
        checks.mask_numbers(b, f"{name} must be finite")


def _masked(
    W: Tensor, b: Tensor | None, mask: Tensor, statistics: Statistics | None
) -> tuple[Tensor, Tensor | None]:
    """W and b with zeros for the classes that take no part, whatever was there."""
    if statistics is not None:
        raise ValueError(
            "mask cannot be used inside accumulate(), whose Gram matrix is that of all classes; "
            "accumulate without this context"
        )
    W = W.masked_fill(~mask.unsqueeze(1), 0.0)
    return W, None if b is None else b.masked_fill(~mask, 0.0)


def _K_dimensional_logits(input: Any, layer: Affine, options: LinearSphericalOptions) -> Tensor:
    """Logits (N, C, d1, …, dK) of rows (N, d) for a weight (C, d1, …, dK, d)."""
    W, b, _ = layer
    if options.engine not in ("auto", "dense"):
        raise ValueError(
            f"linear_weight of shape {tuple(W.shape)} (a K-dimensional loss) needs the logits, "
            f"got engine={options.engine!r}; use engine='dense' (or 'auto')"
        )
    checks.K_dimensional(input, W, b)
    checks.same_dtype(autocast(input), autocast(W), None if b is None else autocast(b))
    flat = None if b is None else b.flatten()
    o = torch.nn.functional.linear(input, W.flatten(0, -2), flat)
    return o.view(len(input), *W.shape[:-1])


def without_logits(loss: losses.Loss, label_smoothing: float, soft: bool) -> Exception | None:
    """The error to raise if this loss cannot be computed without the logits, or None."""
    if not isinstance(loss, losses.Spherical):
        return TypeError(
            f"loss must be spherical for an engine without logits, got {loss}; "
            "use engine='dense' (or 'auto') for this one"
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


def outside_of_accumulate(refusal: Exception) -> Exception:
    """The error of `without_logits` in the context of accumulate(), which has no other engine."""
    return type(refusal)(f"accumulate() never makes the logits: {refusal}, outside of this context")


def autocast(x: Tensor) -> Tensor:
    """x in the dtype to which autocast casts the arguments of `F.linear`."""
    return x.to(multiplied_dtype(x))
