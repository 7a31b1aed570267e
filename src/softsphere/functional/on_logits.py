"""Softmax-like probabilities, and the losses on logits."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere.engines.row_statistics import accumulator, dense_statistics, statistics
from softsphere.functional.conventions import Conventions
from softsphere.stats import Stats
from softsphere.targets import Targets

__all__ = [
    "log_prob",
    "log_prob_checked",
    "log_spherical_softmax",
    "log_taylor_softmax",
    "loss_on_logits",
    "spherical_loss",
    "spherical_softmax",
    "spherical_value",
    "taylor",
    "taylor_softmax",
]


def spherical_loss(
    logits: Tensor,
    target: Tensor,
    loss: str | losses.Loss,
    *,
    target_values: Tensor | None = None,
    weight: Tensor | None = None,
    prior: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Any loss of the package on logits, with the conventions of `F.cross_entropy`.

    Args:
        logits: (C), (N, C) or (N, C, d1, …), floating-point. float16 and bfloat16 are computed in
            float32; the result has the dtype of logits (under autocast: float32).
        target: class indices, shaped as logits without its class dimension; or class
            probabilities, shaped as logits (Σ_k p_k ℓ_k; for the squared error the target vector).
        loss: a name of `softsphere.losses.REGISTRY`, or a loss.
        target_values: (N, K) real values for K-sparse targets (N, K): Σ_j y_j ℓ(t_j), for the
            squared error the non-zero entries of the target vector. −1 in target is padding, in
            any place; the values of an index that is repeated in a row add up.
        weight: (C) class weights, as in `F.cross_entropy`.
        prior: (C) positive class frequencies or counts, the base measure π: f_k ∝ π_k t(o_k).
        reduction: "mean", "sum" or "none". The mean of class indices is weighted by `weight`; that
            of class probabilities and of K-sparse targets divides by the number of rows.
        ignore_index: rows with this target count for nothing.
        label_smoothing: α of (1−α)·ℓ(t) + (α/C)·Σ_k ℓ(k); class probabilities become
            (1−α)·p + α/C.

    Raises: ValueError or TypeError that names the argument, what came and what would do.

    >>> o = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    >>> spherical_loss(o, torch.tensor([0, 1]), "taylor_softmax")
    tensor(0.4032)
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
    return loss_on_logits(logits, target, kind, conventions, target_values=target_values)


def loss_on_logits(
    logits: Tensor,
    target: Tensor,
    loss: losses.Loss,
    conventions: Conventions,
    *,
    target_values: Tensor | None = None,
) -> Tensor:
    """`spherical_loss` with conventions that are checked already."""
    dim = checks.logits_shape(logits)
    o = logits.movedim(dim, -1)
    num_classes, dtype = o.shape[-1], accumulator(o.dtype)
    conventions = conventions.fit(num_classes, dtype)
    if target_values is not None:
        if conventions.label_smoothing:
            raise ValueError("label_smoothing has no meaning with target_values; leave it 0")
        checks.sparse_targets(o, target, target_values)
    else:
        checks.target_shape(logits, dim, target)
        if target.is_floating_point():
            rows = soft_rows(o, target.movedim(dim, -1).to(dtype), loss, conventions)
            return conventions.finish(rows, None, logits)
    entries = conventions.entries(target, target_values, num_classes, dtype)
    if conventions.label_smoothing:
        rows = smoothed_rows(o, entries, loss, conventions)
    else:
        rows = entries.weigh(values_of(o, entries, loss, conventions))
    return conventions.finish(rows, entries.counted, logits)


def values_of(o: Tensor, entries: Targets, loss: losses.Loss, conventions: Conventions) -> Tensor:
    """Losses (...) of the entries, before class weights."""
    pi = conventions.pi
    if isinstance(loss, losses.Spherical):
        x = statistics(o, entries.t, pi, centred=loss.shift_invariant)
        return spherical_value(loss, x, entries, conventions)
    o, kind = o.to(entries.counted.dtype), on_logits(loss)
    if entries.y is None:
        return kind.at(o, entries.t.squeeze(-1), pi)
    return (kind.per_class(o, pi).gather(-1, entries.t) * entries.y).sum(-1)


def spherical_value(
    loss: losses.Spherical, x: Stats, entries: Targets, conventions: Conventions
) -> Tensor:
    """Losses (...) of the entries from their statistics, before class weights."""
    if isinstance(loss, losses.SquaredError) and entries.y is not None:
        conventions.refuse_weight()
    return loss.value(Stats(x.s, x.q, x.c, x.mass, y=entries.y, pi=x.pi))


def smoothed_rows(
    o: Tensor, entries: Targets, loss: losses.Loss, conventions: Conventions
) -> Tensor:
    """Losses (...) of class indices with label smoothing."""
    w, alpha = conventions.weight, conventions.label_smoothing
    each = per_class(o, loss, conventions.pi)
    uniform = (each if w is None else each * w).mean(-1)
    hit = each.gather(-1, entries.t).squeeze(-1)
    rows = (1 - alpha) * entries.counted * hit + alpha * uniform
    return torch.where(entries.ignored, 0.0, rows)


def soft_rows(o: Tensor, p: Tensor, loss: losses.Loss, conventions: Conventions) -> Tensor:
    """Losses (...) of class probabilities p (..., C)."""
    if conventions.ignore_index >= 0:
        raise ValueError(
            "ignore_index has no meaning for class probabilities, got "
            f"{conventions.ignore_index}; leave it out, or give class indices"
        )
    alpha, w = conventions.label_smoothing, conventions.weight
    if alpha:
        p = (1 - alpha) * p + alpha / p.shape[-1]
    if isinstance(loss, losses.SquaredError):
        conventions.refuse_weight()
        return loss.value(dense_statistics(o, conventions.pi, centred=False, y=p))
    each = per_class(o, loss, conventions.pi)
    return (each * (p if w is None else p * w)).sum(-1)


def per_class(o: Tensor, loss: losses.Loss, pi: Tensor | None) -> Tensor:
    """ℓ_k of every class k taken as the target: (..., C)."""
    if isinstance(loss, losses.Spherical):
        return loss.each(dense_statistics(o, pi, centred=loss.shift_invariant, y=None))
    return on_logits(loss).per_class(o.to(accumulator(o.dtype)), pi)


def on_logits(loss: losses.Loss) -> losses.OnLogits:
    if not isinstance(loss, losses.OnLogits):
        raise TypeError(f"loss must be Spherical or OnLogits, got {loss!r}")
    return loss


def log_prob(
    logits: Tensor, loss: str | losses.Loss, dim: int = -1, *, prior: Tensor | None = None
) -> Tensor:
    """log f_k of every class along `dim`, in the dtype of logits, for a normalised loss.

    f_k = π_k t(o_k) / Σ_j π_j t(o_j), π from `prior` (C). Raises TypeError for a loss that is not
    a distribution.

    >>> log_prob(torch.zeros(2), "taylor_softmax", prior=torch.tensor([1.0, 3.0])).exp()
    tensor([0.2500, 0.7500])
    """
    return log_prob_checked(
        logits, losses.get(loss), dim, None if prior is None else checks.prior(prior)
    )


def log_prob_checked(logits: Tensor, loss: losses.Loss, dim: int, pi: Tensor | None) -> Tensor:
    """`log_prob` for a prior that is checked and normalised already."""
    checks.along(logits, dim)
    o = logits.movedim(dim, -1).to(accumulator(logits.dtype))
    log_t = loss.log_numerator(o)
    if pi is not None:
        checks.class_vector("prior", pi, o.shape[-1])
        log_t = log_t + pi.to(o.dtype).log()
    return torch.log_softmax(log_t, -1).movedim(-1, dim).to(logits.dtype)


def log_taylor_softmax(logits: Tensor, dim: int = -1, order: int = 2) -> Tensor:
    """log f_n(o_k) − log Σ_j f_n(o_j) along `dim`, f_n(o) = Σ_{i≤n} oⁱ/i!, n = `order` even.

    >>> log_taylor_softmax(torch.tensor([0.0, 1.0])).exp()
    tensor([0.2857, 0.7143])
    """
    return log_prob(logits, taylor(order), dim)


def taylor_softmax(logits: Tensor, dim: int = -1, order: int = 2) -> Tensor:
    """f_n(o_k) / Σ_j f_n(o_j) along `dim`; see `log_taylor_softmax`. arXiv:1511.05042, §3.2."""
    return log_taylor_softmax(logits, dim, order).exp()


def log_spherical_softmax(logits: Tensor, dim: int = -1, eps: float = 1.0) -> Tensor:
    """log(o_k² + ε) − log Σ_j (o_j² + ε) along `dim`, ε > 0.

    >>> log_spherical_softmax(torch.tensor([0.0, 1.0])).exp()
    tensor([0.3333, 0.6667])
    """
    return log_prob(logits, losses.SphericalSoftmax(eps), dim)


def spherical_softmax(logits: Tensor, dim: int = -1, eps: float = 1.0) -> Tensor:
    """(o_k² + ε) / Σ_j (o_j² + ε) along `dim`. arXiv:1511.05042, §3.1."""
    return log_spherical_softmax(logits, dim, eps).exp()


def taylor(order: int) -> losses.Loss:
    """Taylor softmax of that even order: the spherical one where it is 2."""
    checks.even_order(order)
    return losses.TaylorSoftmax() if order == 2 else losses.HigherTaylorSoftmax(order)
