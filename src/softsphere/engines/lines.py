"""How the outputs of a group are laid out: a line is a row with a block of leaves of its cluster.

Every cluster that has rows is cut into blocks of B leaves, and a row needs one line for each block
of its cluster. The outputs of a batch are a matrix (N, B) of N lines, row by row. The last block of
a cluster may have fewer leaves; places beyond its end repeat its last leaf, and what is computed
there is not read. Where the clusters with rows have about the same size, one block is a cluster.

For products of several rows with the leaves of their cluster, the rows of each cluster are cut into
tiles of R rows, in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere.engines.grouping import Group, Touched, consecutive, ranges

__all__ = ["Lines", "Tiles"]

# How many times the leaves of the clusters with rows their blocks may hold if one block is to be a
# cluster, and the smallest block otherwise.
_ROOM, _SMALLEST_BLOCK = 1.1, 8
# One tile takes all rows of a cluster if they are so few, or if tiles hold so many times the rows.
_FEW_ROWS, _ROOM_OF_TILES = 16, 1.5


@dataclass(frozen=True, eq=False)
class Lines:
    """The lines of a group.

    size: B, the leaves of a block.
    """

    group: Group
    size: int

    @classmethod
    def of(cls, group: Group) -> Lines:
        return cls(group, _block_size(group.touched))

    @property
    def touched(self) -> Touched:
        return self.group.touched

    @cached_property
    def is_whole(self) -> bool:
        """Whether every block is a whole cluster, so that every row has one line."""
        return self.size >= self.touched.largest

    @cached_property
    def blocks(self) -> Tensor:
        """(U) how many blocks each cluster with rows has."""
        return _portions(self.touched.sizes, self.size)

    @cached_property
    def first_block(self) -> Tensor:
        """(U) the first block of each cluster."""
        return self.blocks.cumsum(0) - self.blocks

    @cached_property
    def cluster_of_block(self) -> Tensor:
        """(V) which of the U clusters each block is of."""
        return consecutive(self.blocks)

    @cached_property
    def _places(self) -> Tensor:
        """(V, B) the leaves of the blocks, where a cluster had no end."""
        first, device = self.touched.starts, self.touched.starts.device
        if not self.is_whole:
            u = self.cluster_of_block
            number = torch.arange(len(u), device=device) - self.first_block.index_select(0, u)
            first = first.index_select(0, u) + number * self.size
        return first.unsqueeze(1) + torch.arange(self.size, device=device)

    @cached_property
    def _last(self) -> Tensor:
        """(V, 1) the last leaf of the cluster of each block."""
        last = self.touched.starts + self.touched.sizes - 1
        return (last if self.is_whole else last.index_select(0, self.cluster_of_block)).unsqueeze(1)

    @cached_property
    def has_padding(self) -> bool:
        """Whether there are places beyond the end of a cluster."""
        return self._places.numel() > self.touched.leaves

    @cached_property
    def leaves(self) -> Tensor:
        """(V, B) the leaves of the blocks; places beyond the end of a cluster repeat its last."""
        return self._places.minimum(self._last) if self.has_padding else self._places

    @cached_property
    def padding(self) -> Tensor:
        """(V, B) whether a place is beyond the end of its cluster."""
        return self._places > self._last

    @cached_property
    def lines_of_row(self) -> Tensor:
        """(n) how many lines each row has."""
        return self.blocks.index_select(0, self.touched.of_row)

    @cached_property
    def row(self) -> Tensor:
        """(N) the row of each line."""
        of_row = self.touched.of_row
        if self.is_whole:
            return torch.arange(len(of_row), device=of_row.device)
        return consecutive(self.lines_of_row)

    @cached_property
    def block(self) -> Tensor:
        """(N) the block of each line."""
        of_row = self.touched.of_row
        if self.is_whole:
            return of_row
        return ranges(self.first_block.index_select(0, of_row), self.lines_of_row)

    @cached_property
    def leaf(self) -> Tensor:
        """(N, B) the leaves of the lines."""
        return self.leaves.index_select(0, self.block)

    @cached_property
    def offsets(self) -> Tensor:
        """(n) the first place of each row in the outputs (N B)."""
        if self.is_whole:
            return self.row * self.size
        return (self.lines_of_row.cumsum(0) - self.lines_of_row) * self.size

    @cached_property
    def own(self) -> Tensor:
        """(n) the place of the target of each row in the outputs (N B)."""
        start = self.touched.starts.index_select(0, self.touched.of_row)
        return self.offsets + (self.group.target - start)

    def spread(self, x: Tensor) -> Tensor:
        """A value x (L) of each leaf in the layout of the outputs (N, B)."""
        of_block = x.index_select(0, self.leaves.flatten()).view(self.leaves.shape)
        return of_block.index_select(0, self.block)

    def cleared(self, o: Tensor) -> Tensor:
        """Sets what is beyond the end of a cluster in (N, B) to 0, in place."""
        return o.masked_fill_(self._padding_of_lines, 0.0) if self.has_padding else o

    @cached_property
    def _padding_of_lines(self) -> Tensor:
        return self.padding.index_select(0, self.block)

    def sums_of_rows(self, x: Tensor) -> Tensor:
        """The sums of the lines (N, …) of each row: (n, …)."""
        if self.is_whole:
            return x
        n = len(self.group.cluster)
        return x.new_zeros(n, *x.shape[1:]).index_add_(0, self.row, x)

    def of_rows(self, x: Tensor) -> Tensor:
        """The value x (n) of its row for each line: (N, 1)."""
        return (x if self.is_whole else x.index_select(0, self.row)).unsqueeze(1)

    @cached_property
    def tiles(self) -> Tiles:
        """The tiles of rows for these lines."""
        return Tiles.of(self)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Products of tiles of rows with blocks of leaves.

    The first V products are those of the first tile of each cluster with all of its blocks, in the
    order of the blocks. Those of further tiles follow.

    rows: (I, R) the rows of each product; places beyond the rows of the cluster repeat its last.
    line: (N) the place of each line among the I R rows of the products.
    further: (I − V) the blocks of the further products.
    """

    rows: Tensor
    line: Tensor
    further: Tensor

    @classmethod
    def of(cls, lines: Lines) -> Tiles:
        touched = lines.touched
        R, u = _tile_size(touched), touched.of_row
        within = torch.arange(len(u), device=u.device) - touched.first_row.index_select(0, u)
        if touched.most_rows <= R:
            first, last, further = touched.first_row, touched.first_row + touched.rows - 1, u[:0]
            if not lines.is_whole:
                first, last = (x.index_select(0, lines.cluster_of_block) for x in (first, last))
                within = within.index_select(0, lines.row)
            line = lines.block * R + within
        else:
            first, last, line, further = _several_tiles(lines, R, within)
        rows = first.unsqueeze(1) + torch.arange(R, device=u.device)
        return cls(rows.minimum(last.unsqueeze(1)), line, further)


def _several_tiles(lines: Lines, R: int, within: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first and last row of each product, the places of the lines, and the further blocks.

    within: (n) the number of each row among those of its cluster.
    """
    touched, blocks, V = lines.touched, lines.blocks, len(lines.cluster_of_block)
    further = blocks * (_portions(touched.rows, R) - 1)
    first_further = further.cumsum(0) - further
    u = consecutive(further)
    k = torch.arange(len(u), device=u.device) - first_further.index_select(0, u)
    wide = blocks.index_select(0, u)
    number = F.pad(1 + k.div(wide, rounding_mode="floor"), (V, 0))
    block = lines.first_block.index_select(0, u) + k.remainder(wide)
    u = torch.cat([lines.cluster_of_block, u])
    first = touched.first_row.index_select(0, u) + number * R
    last = (touched.first_row + touched.rows - 1).index_select(0, u)
    tile, place = within.div(R, rounding_mode="floor"), within.remainder(R)
    later = (V + first_further - lines.first_block).index_select(0, touched.of_row)
    later += (tile - 1) * lines.lines_of_row
    shift = torch.where(tile > 0, later, 0) * R + place
    return first, last, lines.block * R + shift.index_select(0, lines.row), block


def _block_size(touched: Touched) -> int:
    """The leaves of a block: those of the largest cluster, or about a quarter of the mean."""
    largest, U = touched.largest, len(touched.cluster)
    if largest * U <= _ROOM * touched.leaves or largest <= _SMALLEST_BLOCK:
        return max(1, largest)
    return max(_SMALLEST_BLOCK, _power_below(max(1, touched.leaves // (4 * U))))


def _tile_size(touched: Touched) -> int:
    """The rows of a tile: those of the cluster with most, or about twice the mean."""
    most, U, n = touched.most_rows, len(touched.cluster), len(touched.of_row)
    if most <= _FEW_ROWS or most * U <= _ROOM_OF_TILES * n:
        return max(1, most)
    return max(_FEW_ROWS, _power_below(2 * n // U))


def _power_below(number: int) -> int:
    """The largest power of two that is not above a number of at least 1."""
    return 1 << (number.bit_length() - 1)


def _portions(lengths: Tensor, size: int) -> Tensor:
    """How many portions of a size segments have."""
    return (lengths + (size - 1)).div(size, rounding_mode="floor")
