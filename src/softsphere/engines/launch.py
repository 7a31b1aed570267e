"""Tile sizes, splits and launches of the Triton kernels, and what is left of their sums.

H and W have any strides; all other tensors are contiguous. A grid of no programs is no launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softsphere.engines import kernels
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
    """What a product may round its float32 factors to: the same as PyTorch's own products."""
    matmul = torch.backends.cuda.matmul
    # where fp32_precision has been set, reading allow_tf32 is an error
    allowed = getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "ieee"


def splits(tiles: int, W: Tensor, others: int) -> int:
    """Among how many programs to split a sum over tiles, of which `others` run side by side."""
    processors = 4
    if W.is_cuda:
        processors = torch.cuda.get_device_properties(W.device).multi_processor_count
    return min(tiles, 1 + 4 * processors // max(others, 1))


def interpretable(x: Tensor) -> Tensor:
    """x, widened if bfloat16 is interpreted: its products would be of bits, its rounding down."""
    return x.float() if INTERPRETED and x.dtype == torch.bfloat16 else x


def accumulate_in(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def output_options(H: Tensor, W: Tensor) -> dict[str, Any]:
    """Strides and constants of the kernels that make tiles of o."""
    precision = input_precision(W.dtype)
    tile = Tile.of(W.dtype, precision)
    return {
        "stride_hm": H.stride(0),
        "stride_hd": H.stride(1),
        "stride_wk": W.stride(0),
        "stride_wd": W.stride(1),
        "ACC": accumulate_in(W.dtype),
        "BM": min(tile.side, max(16, triton.next_power_of_2(len(H)))),
        "BN": tile.side,
        "BD": tile.depth,
        "PRECISION": precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def mean_output(
    H: Tensor, W: Tensor, b: Tensor | None, pi: Tensor | None, mass: float | Tensor
) -> Tensor:
    """Σ_k π_k o_ik / M (m), from Σ_k π_k W_k and so without the outputs."""
    (D, d), acc = W.shape, accumulator(W.dtype)
    classes, columns = 32, 128
    across = triton.cdiv(d, columns)
    parts = splits(triton.cdiv(D, classes), W, across)
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
            ACC=accumulate_in(acc),
            BN=classes,
            BD=columns,
        )
    mean = H.to(acc) @ (partial.sum(0) / mass)
    if b is None:
        return mean
    return mean + ((b if pi is None else b * pi).sum(dtype=acc) / mass).to(acc)


def sums(
    H: Tensor, W: Tensor, b: Tensor | None, pi: Tensor | None, mean: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ π (o − mean) and Σ π (o − mean)² (m), and o − mean at target (m, K)."""
    H, W = interpretable(H), interpretable(W)
    (m, d), D, K = H.shape, len(W), target.shape[1]
    options = output_options(H, W)
    row_tiles = triton.cdiv(m, options["BM"])
    parts = splits(triton.cdiv(D, options["BN"]), W, row_tiles)
    partial = mean.new_empty((2, parts, m))
    c = mean.new_full((m, K), torch.nan)
    with torch.cuda.device_of(W):
        kernels.statistics_kernel[row_tiles, parts](
            H, W, b, pi, mean, target, partial, c, m, D, d, K, parts, **options
        )
    return partial[0].sum(0), partial[1].sum(0), c


def output_gradient(
    H: Tensor,
    W: Tensor,
    b: Tensor | None,
    pi: Tensor | None,
    mean: Tensor,
    target: Tensor,
    partials: tuple[Tensor, Tensor, Tensor],
    first: int,
    G: Tensor,
) -> None:
    """Fills G (C, m) with the gradient by o of the classes from `first` on, C of them.

    partials: those by s, q (m) and c (m, K).
    """
    (C, m), d, K = G.shape, H.shape[1], target.shape[1]
    part = slice(first, first + C)
    H, W, out = interpretable(H), interpretable(W[part]), interpretable(G)
    b, pi = (None if x is None else x[part] for x in (b, pi))
    options = output_options(H, W)
    grid = triton.cdiv(m, options["BM"]) * triton.cdiv(C, options["BN"])
    with torch.cuda.device_of(W):
        kernels.gradient_kernel[grid,](
            H, W, b, pi, mean, target, *partials, out, first, m, C, d, K, **options
        )
    if out is not G:
        G.copy_(out)


def gram_options(W: Tensor, exact: bool) -> dict[str, Any]:
    """Constants of the Gram kernel; exact: its factors are W as it came, without pi and mean."""
    precision = input_precision(W.dtype)
    tile = Tile.of(W.dtype, precision)
    if W.dtype.itemsize == 2 and not exact:
        # they must not be rounded to two bytes; in three parts of TF32 they have 22 bits and more
        precision = "ieee" if torch.version.hip else "tf32x3"
        tile = Tile.of(torch.float32, precision)
    return {
        "ACC": accumulate_in(W.dtype),
        "BJ": tile.side,
        "BN": tile.depth,
        "PRECISION": precision,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def gram(W: Tensor, pi: Tensor | None, mean: Tensor | None) -> Tensor:
    """Σ_k π_k (w_k − mean)(w_k − mean)ᵀ (d, d)."""
    W = interpretable(W)
    (D, d), acc = W.shape, accumulator(W.dtype)
    options = gram_options(W, pi is None and mean is None)
    across = triton.cdiv(d, options["BJ"])
    parts = splits(triton.cdiv(D, options["BN"]), W, across * (across + 1) // 2)
    partial = W.new_empty((parts, d, d), dtype=acc)
    mean = None if mean is None else mean.to(acc)
    with torch.cuda.device_of(W):
        kernels.gram_kernel[across, across, parts](
            W, pi, mean, partial, D, d, parts, *W.stride(), **options
        )
    upper = partial.sum(0).triu()
    return upper + upper.triu(1).mT
