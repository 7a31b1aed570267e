"""Integers by which equal rows of a weight are found."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere._torch import exporting

__all__ = ["keys_of_rows"]

# Rows of a piece that stays in the cache of a processor, and the numbers of a piece elsewhere.
_ROWS, _NUMBERS = 1024, 1 << 25
# Odd numbers without a pattern.
_FIRST, _SECOND = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def keys_of_rows(*blocks: Tensor) -> Tensor:
    """Integers (n) for rows in blocks of columns (n, w), equal for equal rows on every machine.

    Different rows have different ones, but for a chance of about 2⁻⁶⁰ for each pair.
    """
    device = blocks[0].device
    key = torch.zeros(blocks[0].shape[0], dtype=torch.long, device=device)
    for x in blocks:
        rows = _ROWS if device.type == "cpu" else max(_ROWS, _NUMBERS // max(x.shape[1], 1))
        # the number of pieces would be part of an export
        pieces = [x] if exporting() else x.split(rows)
        key = key * _FIRST + torch.cat([_keys(piece) for piece in pieces])
    return key


def _keys(rows: Tensor) -> Tensor:
    """Σ_j mixed(bits_j) c_j modulo 2⁶⁴, where −0 has the bits of 0.

    Without the mixing, numbers that differ in one high bit, such as c and −c, would differ in the
    high bits of a key alone. With powers of one number as the c_j, differences of rows whose signs
    make a pattern, such as those of a Hadamard matrix, would have many powers of 2 as factors.
    """
    width = rows.shape[1] * rows.element_size() // 4
    bits = (rows + 0.0).flatten().view(torch.int32).view(len(rows), width)
    mixed = _mix_(bits.long())
    factors = torch.arange(1, width + 1, device=rows.device)
    factors = _mix_(_mix_(factors).mul_(_SECOND)) | 1
    # Only a CPU has a product of integer matrices.
    return mixed @ factors if mixed.device.type == "cpu" else (mixed * factors).sum(-1)


def _mix_(x: Tensor) -> Tensor:
    """Replaces integers by others whose low bits depend on all of their bits. Returns x."""
    x.mul_(_FIRST)
    return x.bitwise_xor_(x >> 32)
