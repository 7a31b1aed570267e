"""Integers by which equal rows of a weight are found."""

from __future__ import annotations

import torch
from torch import Tensor

from softsphere._torch import exporting

__all__ = ["keys_of_rows"]

# The keys of rows are polynomials at this number modulo 2⁶⁴.
_BASE = 0x5851F42D4C957F2D


def keys_of_rows(*blocks: Tensor) -> Tensor:
    """Integers (n) for rows in blocks of columns (n, w), equal for equal rows on every machine.

    Different rows have different ones, but for a chance of at most 2⁻⁴⁰ for each pair.
    """
    device = blocks[0].device
    key = torch.zeros(blocks[0].shape[0], dtype=torch.long, device=device)
    # Pieces stay in the cache of a processor. Their number would be part of an export.
    whole = exporting() or device.type != "cpu"
    for x in blocks:
        pieces = [x] if whole else x.split(1024)
        key = key * _BASE + torch.cat([_keys(piece) for piece in pieces])
    return key


def _keys(rows: Tensor) -> Tensor:
    """Σ_j bits_j Bʲ⁺¹ modulo 2⁶⁴, where −0 has the bits of 0."""
    width = rows.shape[1] * rows.element_size() // 4
    bits = (rows + 0.0).flatten().view(torch.int32).view(len(rows), width)
    powers = torch.full((width,), _BASE, dtype=torch.long, device=rows.device).cumprod(0)
    # Only a CPU has a product of integer matrices.
    return bits.long() @ powers if bits.device.type == "cpu" else (bits * powers).sum(-1)
