"""The losses on logits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere._torch import values_on_cpu
from softsphere.engines.row_statistics import dense_statistics, output_statistics, wide_dtype
from softsphere.functional.base_measure import BaseMeasure, fill_masked, restrict
from softsphere.functional.conventions import Conventions
from softsphere.functional.row_parts import Part, in_parts
from softsphere.overflow import with_its_gradient
from softsphere.stats import Stats
from softsphere.targets import Targets

__all__ = ["LOST_DIGITS", "loss_on_logits", "lost_digits", "spherical_loss", "spherical_value"]

LOST_DIGITS = (
    "the squared error has lost its digits in float32, since outputs meet their targets so closely "
    "that it is a difference of nearly equal numbers; compute it in float64, by "
    "options=LinearSphericalOptions(accumulate_dtype=torch.float64) or a layer of that dtype"
)
# The error of q in eps: of every engine, and of sums of the outputs themselves.
_ERROR, _ERROR_ON_LOGITS = 32.0, 4.0


def spherical_loss(
    input: Tensor,
    target: Tensor,
    loss: str | losses.Loss,
    *,
    target_values: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    prior: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Computes any loss of the package on logits, with the conventions of `F.cross_entropy`.

    Args:
        input: logits of shape (C), (N, C) or (N, C, d1, …), in a floating-point dtype. float16 and
            bfloat16 are computed in float32. The result has the dtype of the logits, or float32
            under autocast.
        target: class indices, shaped as the logits without their class dimension; or class
            probabilities, shaped as the logits. The loss of probabilities p is Σ_k p_k ℓ_k; for
            the squared error they are the target vector.
        loss: a name of `softsphere.losses.REGISTRY`, or a loss.
        target_values: (N, K), real values of K-sparse targets (N, K). The loss is Σ_j y_j ℓ(t_j);
            for the squared error they are the non-zero entries of the target vector. A target of
            −1 is padding, in any place. The values of a target that is repeated in a row add up.
        mask: boolean, True for classes that take part; (C) for all rows, or of the shape of the
            logits. The loss is that of the logits of those classes alone. Logits of other
            classes may be anything, and their gradient is 0.
        weight: (C), class weights as in `F.cross_entropy`.
        prior: (C), positive class frequencies or counts, which are the base measure π:
            f_k ∝ π_k t(o_k). It has no gradient.
        reduction: "mean", "sum" or "none". The mean over class indices is weighted by `weight`; the
            mean over class probabilities and over K-sparse targets divides by the number of rows.
        ignore_index: rows with this target have no loss. With None no row is ignored.
        label_smoothing: α of (1−α)·ℓ(t) + (α/C)·Σ_k ℓ(k). Class probabilities become
            (1−α)·p + α/C. Only classes that take part are counted.

    Do not mark classes by large negative logits, as is done with softmax: the losses of this
    package grow again there. Pass `mask`. If the loss is not finite, logits of −∞ or
    `torch.finfo(dtype).min` beside ordinary ones raise ValueError on a CPU, as does one very
    negative number in several places; on a GPU and in compiled code the loss is then NaN or
    infinite. A number such as −10⁴, or the smallest number of float16, cannot be told from an
    output of the model.

    Returns a number, or with reduction "none" a loss for each row, shaped as class indices are.

    Raises ValueError or TypeError for invalid arguments. The message names the argument, the value
    received and a valid alternative.

    Source: that of each loss is in its docstring in `softsphere.losses`.

    >>> o = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    >>> spherical_loss(o, torch.tensor([0, 1]), "taylor_softmax")
    tensor(0.4032)
    >>> some = torch.tensor([[True, True, False], [True, True, True]])
    >>> spherical_loss(o, torch.tensor([0, 1]), "taylor_softmax", mask=some)
    tensor(0.3365)
    """
    kind = losses.get(loss)
    conventions = Conventions.checked(
        kind,
        weight=weight,
        pi=None if prior is None else checks.prior(prior, waits=False),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        mask=mask,
    )
    return loss_on_logits(input, target, kind, conventions, target_values=target_values)


def loss_on_logits(
    input: Any,
    target: Any,
    loss: losses.Loss,
    conventions: Conventions,
    *,
    target_values: Any = None,
) -> Tensor:
    """`spherical_loss` with conventions that are checked already."""
    dim = checks.logits_shape(input)
    o: Tensor = input.movedim(dim, -1)
    num_classes, dtype = o.shape[-1], wide_dtype(o.dtype)
    conventions = conventions.fit(num_classes, dtype, input)
    mask = conventions.mask
    for name, x in (("target", target), ("target_values", target_values), ("mask", mask)):
        checks.same_device(name, x, "input", input)
    soft = False
    if target_values is not None:
        if conventions.label_smoothing:
            raise ValueError("label_smoothing has no meaning with target_values; leave it 0")
        checks.sparse_targets(o, target, target_values)
    else:
        checks.target_shape(input, dim, target)
        soft = target.is_floating_point()
    if mask is not None:
        mask = checks.class_mask(mask, input.shape, dim)
    per_row = mask is not None and mask.dim() == o.dim() > 1
    # The statistics of class indices have parts of their own, with nothing computed twice.
    parted = per_row or soft or bool(conventions.label_smoothing)
    parted = parted or not isinstance(loss, losses.Spherical)
    parted = parted or (isinstance(loss, losses.SquaredError) and target_values is not None)
    entries = None if soft else conventions.entries(target, target_values, num_classes, dtype)

    def rows_of(o: Tensor, part: Part) -> Tensor:
        kept = mask[part] if per_row else mask
        if entries is None:
            p = target.movedim(dim, -1)[part].to(dtype)
            return _soft_rows(o, p, loss, conventions, kept)
        return _entry_rows(o, entries.part(part), loss, conventions, kept)

    if parted:
        given = target, target_values, mask, conventions.weight, conventions.pi
        rows = in_parts(o, rows_of, *given)
    else:
        rows = rows_of(o, ...)
    _refuse_mask_numbers(o, rows, mask)
    return conventions.finish(rows, None if entries is None else entries.counted, input)


def _entry_rows(
    o: Tensor, entries: Targets, loss: losses.Loss, conventions: Conventions, mask: Tensor | None
) -> Tensor:
    """Losses (...) of class indices or K-sparse targets."""
    base = BaseMeasure(conventions.pi)
    if mask is not None:
        of_rows = None if mask.dim() < o.dim() else entries.ignored
        base = restrict(conventions.pi, mask, entries.counted.dtype, of_rows)
        entries.refuse_masked(mask)
        o = fill_masked(o, mask)
    if conventions.label_smoothing:
        return _smoothed_rows(o, entries, loss, conventions, base)
    if isinstance(loss, losses.SquaredError) and entries.y is not None:
        conventions.refuse_weight()
        return entries.weigh(_sparse_squares(loss, o, entries.t, entries.y, base))
    if isinstance(loss, losses.Spherical):
        x = output_statistics(o, entries.t, base.pi, centred=loss.shift_invariant, mass=base.mass)
        value = spherical_value(loss, x, entries, conventions, warns=False)
        if lost_digits(loss, x, entries, value, error=_ERROR_ON_LOGITS):
            wide = output_statistics(o.double(), entries.t, base.pi, centred=False, mass=base.mass)
            value = spherical_value(loss, wide, entries, conventions).to(value.dtype)
        return entries.weigh(value)
    o, kind = o.to(entries.counted.dtype), _on_logits(loss)
    if entries.y is None:
        return entries.weigh(kind.at(o, entries.t.squeeze(-1), base.pi), overflows=False)
    each = _per_class(o, kind, base).gather(-1, entries.t)
    # A loss that is infinite counts for nothing where its value is 0, as at padding.
    each = torch.where((entries.y == 0) & ~each.isfinite(), 0.0, each)
    return entries.weigh((each * entries.y).sum(-1), overflows=False)


def _sparse_squares(
    loss: losses.SquaredError, o: Tensor, t: Tensor, y: Tensor, base: BaseMeasure
) -> Tensor:
    """Σ_k w_k π_k (o_k − y_k)² (...) of target values y (..., K) at the classes t."""
    # o − y is in memory once, and nothing large cancels in its q
    rest = o.to(y.dtype).scatter_add(-1, t, -y)
    x = output_statistics(rest, t, base.pi, centred=False, mass=base.mass)
    alpha = loss.unobserved
    if alpha == 1:
        return x.q
    known = torch.where(y == 0, 0.0, (1 - alpha) * x.c * x.c)
    return alpha * x.q + (known if x.pi is None else x.pi * known).sum(-1)


def lost_digits(
    loss: losses.Loss, x: Stats, entries: Targets, value: Tensor, *, error: float = _ERROR
) -> bool:
    """Whether losses (...) have lost their digits, as squared errors may. It looks on a CPU alone.

    error: that of q in eps.
    """
    if not isinstance(loss, losses.SquaredError) or not values_on_cpu(value):
        return False
    x = replace(x, y=entries.y)
    return value.dtype != torch.float64 and bool(loss.lost_digits(x, value.detach(), error))


def spherical_value(
    loss: losses.Spherical,
    x: Stats,
    entries: Targets,
    conventions: Conventions,
    *,
    warns: bool = True,
) -> Tensor:
    """Losses (...) of the entries from their statistics, before class weights.

    warns: whether digits that are lost are told, for a caller that does not look itself.
    """
    if isinstance(loss, losses.SquaredError) and entries.y is not None:
        conventions.refuse_weight()
    pi = x.pi
    if conventions.mask is not None and pi is not None and entries.y is not None:
        # Padding looks at class 0, which may be masked out: π = 0 has no logarithm.
        pi = torch.where((entries.y == 0) & (pi == 0), 1.0, pi)
    value = loss.value(Stats(x.s, x.q, x.c, x.mass, y=entries.y, pi=pi))
    if warns and lost_digits(loss, x, entries, value):
        warnings.warn(LOST_DIGITS, stacklevel=2)
    return value


def _smoothed_rows(
    o: Tensor, entries: Targets, loss: losses.Loss, conventions: Conventions, base: BaseMeasure
) -> Tensor:
    """Losses (...) of class indices with label smoothing."""
    w, alpha = conventions.weight, conventions.label_smoothing
    each = _per_class(o, loss, base)
    uniform = base.mean(each if w is None else each * w)
    hit = each.gather(-1, entries.t).squeeze(-1)
    rows = (1 - alpha) * entries.counted * hit + alpha * uniform
    if isinstance(loss, losses.Spherical):
        return with_its_gradient(rows.masked_fill(entries.ignored, 0.0))
    return torch.where(entries.ignored, 0.0, rows)


def _soft_rows(
    o: Tensor, p: Tensor, loss: losses.Loss, conventions: Conventions, mask: Tensor | None
) -> Tensor:
    """Losses (...) of class probabilities p (..., C)."""
    if conventions.ignore_index is not None and conventions.ignore_index >= 0:
        raise ValueError(
            "ignore_index has no meaning for class probabilities, got "
            f"{conventions.ignore_index}; leave it out, or give class indices"
        )
    base = BaseMeasure(conventions.pi)
    if mask is not None:
        base = restrict(conventions.pi, mask, p.dtype)
        checks.masked_targets((p != 0) & ~mask)
        o = fill_masked(o, mask)
    alpha, w = conventions.label_smoothing, conventions.weight
    if isinstance(loss, losses.SquaredError):
        conventions.refuse_weight()
        y = _smoothed(p, alpha, base)
        o = o.to(y.dtype)
        if loss.unobserved != 1:
            return with_its_gradient(loss.of_vector(o, y, base.pi))
        none = torch.empty(*o.shape[:-1], 0, dtype=torch.long, device=o.device)
        x = output_statistics(o - y, none, base.pi, centred=False, mass=base.mass)
        return with_its_gradient(x.q)
    p = _smoothed(p, alpha, base)
    rows = base.sum(_per_class(o, loss, base) * (p if w is None else p * w))
    return with_its_gradient(rows) if isinstance(loss, losses.Spherical) else rows


def _smoothed(p: Tensor, alpha: float, base: BaseMeasure) -> Tensor:
    if not alpha:
        return p
    count = p.shape[-1] if base.mass is None else base.mass.unsqueeze(-1)
    return (1 - alpha) * p + alpha / count


def _per_class(o: Tensor, loss: losses.Loss, base: BaseMeasure) -> Tensor:
    """ℓ_k of every class k taken as the target: (..., C). It is 0 for masked classes."""
    if isinstance(loss, losses.Spherical):
        centred = loss.shift_invariant
        each = loss.each(dense_statistics(o, base.pi, centred=centred, y=None, mass=base.mass))
    else:
        each = _on_logits(loss).per_class(o.to(wide_dtype(o.dtype)), base.pi)
    # The loss of a masked class is infinite, and its product with a weight of 0 would be NaN.
    return each if base.mask is None else torch.where(base.mask, each, 0.0)


def _on_logits(loss: losses.Loss) -> losses.OnLogits:
    if not isinstance(loss, losses.OnLogits):
        raise TypeError(f"loss must be Spherical or OnLogits, got {loss!r}")
    return loss


def _refuse_mask_numbers(o: Tensor, rows: Tensor, mask: Tensor | None) -> None:
    """Raises ValueError if a mask of softmax in o is why losses are not finite, on a CPU."""
    if not values_on_cpu(rows):
        return
    lost = ~rows.isfinite()
    if bool(lost.any()):
        checks.mask_numbers((o if mask is None else fill_masked(o, mask))[lost])
