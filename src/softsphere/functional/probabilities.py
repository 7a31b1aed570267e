"""Softmax-like probabilities of logits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softsphere import checks, losses
from softsphere._torch import saveable_in_exports, values_on_cpu
from softsphere.engines.row_statistics import wide_dtype
from softsphere.functional.base_measure import check_mask, fill_masked

__all__ = [
    "TopK",
    "log_prob",
    "log_spherical_softmax",
    "log_taylor_softmax",
    "normalise",
    "spherical_softmax",
    "taylor",
    "taylor_softmax",
]


class TopK(NamedTuple):
    """The k best classes of each row, best first, as `torch.topk` returns them.

    Args:
        values: (…, k), their log-probabilities, or their outputs if the loss has no probabilities.
        indices: (…, k) int64, the classes.
    """

    values: Tensor
    indices: Tensor


saveable_in_exports(TopK)


def log_prob(
    input: Tensor,
    loss: str | losses.Loss,
    dim: int | None = -1,
    *,
    prior: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes log f_k for every class along `dim`, for a loss that is a distribution.

    f_k = π_k t(o_k) / Σ_j π_j t(o_j).

    Args:
        input: logits of any shape. float16 and bfloat16 are computed in float32 and rounded once.
        loss: a name of `softsphere.losses.REGISTRY`, or a loss.
        dim: the dimension of the classes. None chooses one as `F.softmax` does, with its warning.
        prior: (C), positive class frequencies or counts: the base measure π.
        mask: boolean, True for classes that take part, (C) or of the shape of the logits. Other
            classes have the probability 0, and a gradient of 0.
        dtype: the logits are converted to this dtype first, as in `F.softmax`.

    Returns a tensor of the shape of the logits, in their dtype or in `dtype`.

    Raises TypeError for a loss that is not a distribution, and ValueError or TypeError for other
    invalid arguments. On a CPU these include logits by which softmax would leave out a class, such
    as −∞, where t(o) is infinite; pass `mask` instead.

    >>> log_prob(torch.zeros(2), "taylor_softmax", prior=torch.tensor([1.0, 3.0])).exp()
    tensor([0.2500, 0.7500])
    """
    kind = losses.get(loss)
    return _normalised(torch.log_softmax, "log_prob", input, kind, dim, prior, mask, dtype)


def log_taylor_softmax(
    input: Tensor,
    dim: int | None = -1,
    order: int = 2,
    *,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes log f_n(o_k) − log Σ_j f_n(o_j) along `dim`, with f_n(o) = Σ_{i≤n} oⁱ/i!.

    Args:
        order: n, even and from 2 to 20.
        input, dim, mask, dtype: as in `log_prob`.

    Source: de Brébisson & Vincent 2015, arXiv:1511.05042, §3.2 (n = 2); Banerjee et al. 2020,
    arXiv:2011.11538 (higher orders).

    >>> log_taylor_softmax(torch.tensor([0.0, 1.0])).exp()
    tensor([0.2857, 0.7143])
    """
    name = "log_taylor_softmax"
    return _normalised(torch.log_softmax, name, input, taylor(order), dim, None, mask, dtype)


def taylor_softmax(
    input: Tensor,
    dim: int | None = -1,
    order: int = 2,
    *,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes f_n(o_k) / Σ_j f_n(o_j) along `dim`, with f_n(o) = Σ_{i≤n} oⁱ/i!.

    Args:
        order: n, even and from 2 to 20.
        input, dim, mask, dtype: as in `log_prob`.

    Returns a tensor of the shape of the logits, whose entries along `dim` sum to one.

    Source: as of `log_taylor_softmax`.

    >>> taylor_softmax(torch.tensor([0.0, 1.0]))
    tensor([0.2857, 0.7143])
    """
    name = "taylor_softmax"
    return _normalised(torch.softmax, name, input, taylor(order), dim, None, mask, dtype)


def log_spherical_softmax(
    input: Tensor,
    dim: int | None = -1,
    eps: float = 1.0,
    *,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes log(o_k² + ε) − log Σ_j (o_j² + ε) along `dim`.

    Args:
        eps: ε > 0.
        input, dim, mask, dtype: as in `log_prob`.

    Source: de Brébisson & Vincent 2015, arXiv:1511.05042, §3.1.

    >>> log_spherical_softmax(torch.tensor([0.0, 1.0])).exp()
    tensor([0.3333, 0.6667])
    """
    name, loss = "log_spherical_softmax", losses.SphericalSoftmax(eps)
    return _normalised(torch.log_softmax, name, input, loss, dim, None, mask, dtype)


def spherical_softmax(
    input: Tensor,
    dim: int | None = -1,
    eps: float = 1.0,
    *,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computes (o_k² + ε) / Σ_j (o_j² + ε) along `dim`.

    Args:
        eps: ε > 0.
        input, dim, mask, dtype: as in `log_prob`.

    Returns a tensor of the shape of the logits, whose entries along `dim` sum to one.

    Source: as of `log_spherical_softmax`.

    >>> spherical_softmax(torch.tensor([0.0, 1.0]))
    tensor([0.3333, 0.6667])
    """
    name, loss = "spherical_softmax", losses.SphericalSoftmax(eps)
    return _normalised(torch.softmax, name, input, loss, dim, None, mask, dtype)


def taylor(order: int) -> losses.Loss:
    """Returns Taylor softmax of an even order: the spherical one if it is 2."""
    checks.even_order(order)
    return losses.TaylorSoftmax() if order == 2 else losses.HigherTaylorSoftmax(int(order))


def normalise(
    function: Callable[[Tensor, int], Tensor],
    input: Tensor,
    loss: losses.Loss,
    dim: int,
    pi: Tensor | None,
    mask: Any,
) -> Tensor:
    """softmax or log_softmax of log π_k t(o_k) along `dim`, in float32 or wider, not rounded."""
    dim = checks.along(input, dim)
    if input.dim() == 0:
        return normalise(function, input.unsqueeze(0), loss, 0, pi, mask).squeeze(0)
    o = input.movedim(dim, -1)
    kept = None if mask is None else check_mask(mask, input, dim % input.dim())
    if kept is not None:
        o = fill_masked(o, kept)
    log_t = _log_numerators(o, loss, pi)
    if kept is not None:
        log_t = torch.where(kept, log_t, -torch.inf)
    return function(log_t, -1).movedim(-1, dim)


def _log_numerators(o: Tensor, loss: losses.Loss, pi: Tensor | None) -> Tensor:
    """log π_k t(o_k) of outputs (..., C), in float32 or wider."""
    log_t = loss.log_numerator(o.to(wide_dtype(o.dtype)))
    if values_on_cpu(o):
        lost = log_t.isposinf() & ~o.isposinf()
        if bool(lost.any()):
            checks.mask_numbers(o[lost.any(-1)])
            # the square of a large float32 number overflows, but not in float64
            log_t = loss.log_numerator(o.double()).to(log_t.dtype)
    if pi is None:
        return log_t
    checks.without_gradient("prior", pi)
    checks.class_vector("prior", pi, o.shape[-1])
    checks.same_device("prior", pi, "input", o)
    return log_t + checks.narrowed_prior(pi, log_t.dtype).log()


def _normalised(
    function: Callable[[Tensor, int], Tensor],
    name: str,
    input: Any,
    loss: losses.Loss,
    dim: int | None,
    prior: Any,
    mask: Any,
    dtype: torch.dtype | None,
) -> Tensor:
    if dtype is not None:
        checks.dense("input", input)
        checks.floating_dtype(dtype)
        input = input.to(dtype)
    checks.floating("input", input)
    if dim is None:
        dim = _implicit_dim(name, input.dim())
    pi = None if prior is None else checks.prior(prior, waits=False)
    return normalise(function, input, loss, dim, pi, mask).to(input.dtype)


def _implicit_dim(name: str, dims: int) -> int:
    """The dimension that `F.softmax` takes if it is given none, with its warning."""
    if not torch.compiler.is_compiling():  # a whole graph has no warnings
        warnings.warn(
            f"Implicit dimension choice for {name} has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=4,
        )
    return 0 if dims in (0, 1, 3) else 1
