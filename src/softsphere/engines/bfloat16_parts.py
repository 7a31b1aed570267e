r"""float32 factors of products as sums of bfloat16 numbers, where products need not be exact.

`torch.set_float32_matmul_precision("high")` allows products that take each float32 number as the
sum of two bfloat16 numbers,

    x ≈ a + b,   a = x rounded to bfloat16,   b = x − a rounded,

to 2⁻¹⁷ of x, and "medium" allows products of a alone. Matrix units multiply such numbers exactly
and sum in float32. bfloat16 has the range of float32, so that rows need no scale: only below 10⁻³⁵
do parts lose digits, and what is not finite stays so.

Two products are taken by parts, since q = hᵀSh is made of them:

    S = Σ x xᵀ ≈ Σ a aᵀ + C + Cᵀ,   C = Σ a bᵀ        P = S h ≈ S' (a + b) + S'' a,   S ≈ S' + S''

C and Cᵀ are each other's mirror, so that S takes two products. Σ a aᵀ is symmetric by blocks, so
the two cost 3 D d² FLOPs, at twice the rate of TF32. One float32 product costs D d². Σ b bᵀ is left
out; it is 2⁻¹⁹ of the diagonal of S on average, and 2⁻¹⁶ at most.

- S in TF32 would take two thirds of that time, and have the error 2⁻¹¹ of outputs in TF32. The
  gradient with respect to W takes longer than either.
- With S = Σ a aᵀ alone, at "medium", q is still a sum of squares, of the outputs of rounded rows.
  An error of P has no such form. It is multiplied by Σ_j h_j² S_jj / q, which may be large. So P,
  which has m rows, is taken in two parts also there.
- The gradient with respect to W, and A = Σ g_q h hᵀ which it is made of, are left to PyTorch's own
  products at the precision that is set: nothing multiplies their errors, and three products of
  parts would take 1.5 times as long as one in TF32.

Rows of half precision that are multiplied with factors of their own, g_q h, are written as the sum
of two parts by the same functions, in their own dtype.

On a GPU the parts are stored as bfloat16. On a CPU they are float32 numbers that have the digits of
bfloat16, so that a float32 product, which oneDNN may round to bfloat16, leaves them as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere._torch import float32_precision, products_have_out_dtype
from softsphere.engines import fused_rows

__all__ = ["number_of_parts", "parts", "parts_dtype", "parts_room"]


def number_of_parts(x: Tensor, dtype: torch.dtype) -> int:
    """How many bfloat16 numbers stand for a number of x in products with results in dtype.

    0: x is converted to dtype. Half-precision x that is multiplied as it is needs no parts.
    """
    if dtype != torch.float32 or (x.is_cuda and not products_have_out_dtype()):
        return 0
    return {"high": 2, "medium": 1}.get(float32_precision(x.device), 0)


def parts_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the parts of x are stored."""
    return torch.bfloat16 if x.is_cuda else torch.float32


def parts_room(x: Tensor, rows: int, count: int) -> Tensor:
    """Memory for the parts of at most `rows` rows of x (n, d)."""
    return x.new_empty((min(rows, len(x)), count * x.shape[1]), dtype=parts_dtype(x))


def parts(
    x: Tensor,
    room: Tensor,
    shift: Tensor | None = None,
    factor: Tensor | None = None,
    eps: float = 1.0,
) -> Tensor:
    """The parts of factor_i (x_i − shift), side by side: (n, count · d) for x (n, d).

    They are written into the first rows of `room` (…, count · d), and are float16 numbers if it is
    of float16. The second part is that over eps, which keeps digits that float16 would lose.
    """
    out = room[: len(x)]
    write = fused_rows.in_parts if fused_rows.usable(x) else _write_parts
    write(x, shift, factor, out, eps)
    return out


def _write_parts(
    x: Tensor, shift: Tensor | None, factor: Tensor | None, out: Tensor, eps: float = 1.0
) -> None:
    kind = torch.float16 if out.dtype == torch.float16 else torch.bfloat16
    d, x = x.shape[1], x.float()
    x = x if shift is None else x - shift
    x = x if factor is None else x * factor.unsqueeze(1)
    high = out[:, :d]
    high.copy_(x.to(kind))
    if out.shape[1] > d:
        out[:, d:].copy_(((x - high) / eps).to(kind))
