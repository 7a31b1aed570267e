"""How many leaves a block has, and how many rows a tile, for which clusters.

A cluster with s leaves and r rows is ⌈s / B⌉ blocks and ⌈r / R⌉ tiles, and each of its blocks is
multiplied with each of its tiles. Large blocks and tiles are empty for the most part where
clusters are small, or where the large ones have few rows; with small ones the leaves and the rows
of a large cluster with many rows are copied many times. So the sizes are those with which products
together hold the fewest numbers: B R outputs each, and a copy of B leaves and of R rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from softsphere.engines.grouping import Touched

__all__ = ["block_and_tile"]

# The smallest block and tile to choose from, and how many rows one tile takes in any case.
_SMALLEST, _FEW_ROWS = 8, 16
# One block is a cluster if blocks then hold at most so many times the leaves, and one tile takes
# its rows if tiles hold at most so many times the rows, both with at most so many times the pairs.
_ROOM_OF_LEAVES, _ROOM_OF_ROWS, _ROOM_OF_PAIRS = 1.1, 1.5, 2.0


def block_and_tile(touched: Touched, width: int) -> tuple[int, int]:
    """B and R for clusters with rows, whose leaves and rows have `width` numbers."""
    T, n, U, P = touched.leaves, len(touched.of_row), len(touched.cluster), touched.pairs
    largest, most = touched.largest, touched.most_rows

    def numbers(size: tuple[int, int]) -> float:
        B, R = size
        # the last block and the last tile of a cluster are half full on average, but a cluster that
        # is smaller than both has a product to itself
        products = P / (B * R) + T / (2 * B) + n / (2 * R) + U
        return products * (B * R + (B + R) * width)

    whole = largest * U <= _ROOM_OF_LEAVES * T and largest * n <= _ROOM_OF_PAIRS * P
    together = most * U <= _ROOM_OF_ROWS * n and most * T <= _ROOM_OF_PAIRS * P
    blocks: Iterable[int] = [max(1, largest)]
    if not whole and largest > _SMALLEST:
        blocks = _powers(_SMALLEST, largest)
    tiles: Iterable[int] = [max(1, most)]
    if not together and most > _FEW_ROWS:
        tiles = _powers(_SMALLEST, most)
    return min(itertools.product(blocks, tiles), key=numbers)


def _powers(least: int, most: int) -> Iterator[int]:
    """A number, twice it, and so on, up to a number."""
    while least <= most:
        yield least
        least *= 2
