"""Passes over rows on a GPU, each by one Triton kernel.

PyTorch's operations would read and write the rows ten times instead. Each function here has a twin
of PyTorch's operations beside the code that calls it.
"""

from __future__ import annotations

import functools
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softsphere.engines.engine import Inputs

if TYPE_CHECKING:  # moments.py calls these passes
    from softsphere.engines.moments import Moments

__all__ = ["add_target_rows", "hidden_gradient", "in_parts", "sums", "usable"]

_INSTALLED = find_spec("triton") is not None
# Columns of a row that a program reads at once, and the rows and columns where it reads several.
_COLUMNS, _SOME_ROWS, _SOME_COLUMNS = 1024, 16, 256


def usable(x: Tensor) -> bool:
    """Whether the kernels can run on the device of x. Triton comes with PyTorch's GPU builds."""
    return _INSTALLED and x.is_cuda and _runs_on(x.device)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether a kernel can be built there, for which Triton needs a C compiler."""
    try:
        one = torch.ones(1, 1, device=device)
        in_parts(one, None, None, one.clone())
    except torch.OutOfMemoryError:  # a later call may find room
        raise
    except Exception as error:  # those of Triton, of the compiler and of the driver
        warnings.warn(
            f"Triton cannot build a kernel for {device}, so that PyTorch's operations take several "
            f"passes in place of one: {error}",
            stacklevel=2,
        )
        return False
    return True


def _kernels() -> ModuleType:
    """The module of the kernels, imported when one is first used: it needs the package triton."""
    from softsphere.engines import row_kernels

    return row_kernels


def _options(dtype: torch.dtype, d: int, columns: int = _COLUMNS) -> dict[str, Any]:
    import triton
    import triton.language as tl

    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "BD": min(columns, triton.next_power_of_2(max(d, 1))),
        "num_warps": 4,
    }


def sums(x: Inputs, P: Tensor, at: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hᵀSh, μ, Σ_j |h_j r_j| with the rest r, and x_t·h at the targets: (m), (m), (m), (m, K).

    P: (m, d), the first entries of S h.
    """
    H, W, S, target = x.H, x.W, at.S, x.target.contiguous()
    (m, d), K = H.shape, target.shape[1]
    mean = at.mean
    column = None if x.b is None else S[:d, d].contiguous()
    squares, size, own = S.new_empty(m), S.new_empty(m), S.new_empty(m, K)
    mu = S.new_empty(m, dtype=torch.float64)
    if m:
        with torch.cuda.device_of(H):
            _kernels().sums_kernel[(m,)](
                H,
                P,
                W,
                column,
                at.shift,
                at.rest,
                mean,
                target,
                squares,
                mu,
                size,
                own,
                d,
                K,
                *H.stride(),
                *W.stride(),
                **_options(S.dtype, d),
            )
    if x.b is None:
        return squares, mu.to(S.dtype), size, own
    last = at.rest[d]
    own += (x.b[target].to(S.dtype) - at.shift[d]) - last
    # rounded only now, since a bias may cancel what the columns of the mean row add
    mu = (mu + mean[d]).to(S.dtype)
    return squares + S[d, d], mu, size + last.abs(), own


def hidden_gradient(
    x: Inputs, P: Tensor, at: Moments, of_P: Tensor, gc: Tensor, of_mean: Tensor | None
) -> Tensor:
    """of_P P + Σ_j gc_j x_{t_j} + of_mean w̄: (m, d), in the dtype of H."""
    W, target = x.W, x.target.contiguous()
    (m, d), K = x.H.shape, target.shape[1]
    out = x.H.new_empty(m, d)
    if m:
        with torch.cuda.device_of(P):
            _kernels().hidden_gradient_kernel[(m,)](
                P,
                W,
                at.shift,
                at.rest,
                at.mean.to(P.dtype),
                target,
                of_P.contiguous(),
                gc.contiguous(),
                None if of_mean is None else of_mean.contiguous(),
                out,
                d,
                K,
                *W.stride(),
                **_options(P.dtype, d),
            )
    return out


def in_parts(
    x: Tensor, shift: Tensor | None, factor: Tensor | None, out: Tensor, eps: float = 1.0
) -> None:
    """Writes the parts of factor_i (x_i − shift) into `out`: (n, d) or (n, 2 d) for x (n, d).

    The first d columns are rounded to half precision, bfloat16 where `out` is wider, and so is what
    they leave over eps, in the last d columns.
    """
    import triton.language as tl

    n, d = x.shape
    options = {k: v for k, v in _options(torch.float32, d).items() if k != "ACC"}
    rows = max(1, _COLUMNS // options["BD"])
    if n:
        with torch.cuda.device_of(x):
            _kernels().parts_kernel[(-(-n // rows),)](
                x,
                shift,
                None if factor is None else factor.contiguous(),
                out,
                n,
                d,
                *x.stride(),
                KIND=tl.float16 if out.dtype == torch.float16 else tl.bfloat16,
                EPS=eps,
                PARTS=out.shape[1] // max(d, 1),
                BR=rows,
                **options,
            )


def add_target_rows(out: Tensor, H: Tensor, target: Tensor, gc: Tensor) -> None:
    """out (D, d)[t_ij] += gc_ij H_i. Equal targets add up in their order, and are rounded once."""
    (m, K), (D, d) = target.shape, out.shape
    # What is nothing, as for the rows that are ignored, is put behind all classes.
    ordered, order = torch.where(gc == 0, D, target).flatten().sort(stable=True)
    if m * K:
        options = _options(gc.dtype, d, _SOME_COLUMNS)
        with torch.cuda.device_of(H):
            _kernels().target_rows_kernel[(m * K, -(-d // options["BD"]))](
                H,
                gc.contiguous(),
                ordered,
                order,
                out,
                m * K,
                d,
                K,
                *H.stride(),
                *out.stride(),
                D,
                BR=_SOME_ROWS,
                **options,
            )
