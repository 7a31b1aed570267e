"""Launches the Triton kernels: tile sizes, splits, and the last part of their sums.

H and W may have any strides; all other tensors are contiguous. A grid without programs launches
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softsphere.engines import kernels
from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.row_statistics import accumulator

__all__ = ["INTERPRETED", "Tile", "gram", "mean_output", "output_gradient", "sums"]

INTERPRETED = not isinstance(kernels.gram_kernel, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Tile:
    """side × side of a product, `depth` of the contracted dimension at a time."""

    side: int
    depth: int
    warps: int
    stages: int = 3

    @staticmethod
    def of(dtype: torch.dtype, precision: str) -> Tile:
        """128 for tensor cores, with 32 KiB of factors a stage; 64 where registers run short."""
        if dtype.itemsize == 2:
            return Tile(128, 64, 8)
        if precision == "tf32":
            return Tile(128, 32, 8)
        return Tile(64, 16 if dtype == torch.float64 else 32, 4)


def input_precision(dtype: torch.dtype) -> str:
    """The precision to which a product may round float32 factors, as PyTorch's own products do."""
    matmul = torch.backends.cuda.matmul
    # where fp32_precision has been set, reading allow_tf32 is an error
    allowed = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "ieee"


def _splits(tiles: int, W: Tensor, others: int) -> int:
    """The number of programs that share a sum over tiles, where `others` such sums run at once."""
    processors = 4
    if W.is_cuda:
        processors = torch.cuda.get_device_properties(W.device).multi_processor_count
    return min(tiles, 1 + 4 * processors // max(others, 1))


def _interpretable(x: Tensor) -> Tensor:
    """x, in float32 if it is bfloat16 and kernels are interpreted.

    The interpreter multiplies bfloat16 as if it were integers, and rounds it down.
    """
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


def _accumulate_in(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _output_options(H: Tensor, W: Tensor) -> dict[str, Any]:
    """Strides and constants of the kernels that make tiles of o."""
    precision = input_precision(W.dtype)
    tile = Tile.of(W.dtype, precision)
    return {
        "stride_hm": H.stride(0),
        "stride_hd": H.stride(1),
        "stride_wk": W.stride(0),
        "stride_wd": W.stride(1),
        "ACC": _accumulate_in(W.dtype),
        "BM": min(tile.side, max(16, triton.next_power_of_2(len(H)))),
        "BN": tile.side,
        "BD": tile.depth,
        "PRECISION": precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def mean_output(x: Inputs) -> Tensor:
    """Σ_k π_k o_ik / M (m), from Σ_k π_k W_k and so without the outputs."""
    H, W, b, _, pi = x
    mass = x.mass
    (D, d), acc = W.shape, accumulator(W.dtype)
    classes, columns = 32, 128
    across = triton.cdiv(d, columns)
    parts = _splits(triton.cdiv(D, classes), W, across)
    partial = W.new_empty((parts, d), dtype=acc)
    with torch.cuda.device_of(W):
        kernels.column_sum_kernel[across, parts](
            W,
            pi,
            partial,
            D,
            d,
            parts,
            *W.stride(),
            ACC=_accumulate_in(acc),
            BN=classes,
            BD=columns,
        )
    mean = H.to(acc) @ (partial.sum(0) / mass)
    if b is None:
        return mean
    return mean + ((b if pi is None else b * pi).sum(dtype=acc) / mass).to(acc)


def sums(x: Inputs, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ π (o − mean) and Σ π (o − mean)² (m), and o − mean at the targets (m, K)."""
    _, _, b, target, pi = x
    H, W = _interpretable(x.H), _interpretable(x.W)
    (m, d), D, K = H.shape, len(W), target.shape[1]
    options = _output_options(H, W)
    row_tiles = triton.cdiv(m, options["BM"])
    parts = _splits(triton.cdiv(D, options["BN"]), W, row_tiles)
    partial = mean.new_empty((2, parts, m))
    c = mean.new_full((m, K), torch.nan)
    with torch.cuda.device_of(W):
        kernels.statistics_kernel[row_tiles, parts](
            H, W, b, pi, mean, target, partial, c, m, D, d, K, parts, **options
        )
    return partial[0].sum(0), partial[1].sum(0), c


def output_gradient(x: Inputs, mean: Tensor, g: Gradients, first: int, G: Tensor) -> None:
    """Fills G (C, m) with the gradient with respect to the outputs of C classes from `first` on."""
    target = x.target
    (C, m), d, K = G.shape, x.H.shape[1], target.shape[1]
    part = slice(first, first + C)
    H, W, out = _interpretable(x.H), _interpretable(x.W[part]), _interpretable(G)
    b, pi = (None if t is None else t[part] for t in (x.b, x.pi))
    options = _output_options(H, W)
    grid = triton.cdiv(m, options["BM"]) * triton.cdiv(C, options["BN"])
    with torch.cuda.device_of(W):
        kernels.gradient_kernel[grid,](
            H, W, b, pi, mean, target, *g, out, first, m, C, d, K, **options
        )
    if out is not G:
        G.copy_(out)


def _gram_options(W: Tensor, exact: bool) -> dict[str, Any]:
    """Constants of the Gram kernel; exact: whether its factors are the rows of W as they came."""
    precision = input_precision(W.dtype)
    tile = Tile.of(W.dtype, precision)
    if W.dtype.itemsize == 2 and not exact:
        # Factors in float32 must not be rounded to two bytes. Three TF32 parts keep 22 bits.
        precision = "ieee" if torch.version.hip else "tf32x3"
        tile = Tile.of(torch.float32, precision)
    return {
        "ACC": _accumulate_in(W.dtype),
        "BJ": tile.side,
        "BN": tile.depth,
        "PRECISION": precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def gram(W: Tensor, pi: Tensor | None, mean: Tensor | None) -> Tensor:
    """Σ_k π_k (w_k − mean)(w_k − mean)ᵀ (d, d)."""
    W = _interpretable(W)
    (D, d), acc = W.shape, accumulator(W.dtype)
    options = _gram_options(W, pi is None and mean is None)
    across = triton.cdiv(d, options["BJ"])
    parts = _splits(triton.cdiv(D, options["BN"]), W, across * (across + 1) // 2)
    partial = W.new_empty((parts, d, d), dtype=acc)
    mean = None if mean is None else mean.to(acc)
    with torch.cuda.device_of(W):
        kernels.gram_kernel[across, across, parts](
            W, pi, mean, partial, D, d, parts, *W.stride(), **options
        )
    upper = partial.sum(0).triu()
    return upper + upper.triu(1).mT
