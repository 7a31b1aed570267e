"""How the outputs of a group are laid out: a line is a row with a block of leaves of its cluster.

Every cluster that has rows is cut into blocks of B leaves, and a row needs one line for each block
of its cluster. The outputs of a batch are a matrix (N, B) of N lines, row by row. The last block of
a cluster may have fewer leaves; places beyond its end repeat its last leaf, and what is computed
there is not read. Where the clusters with rows have about the same size, one block is a cluster.

For products of several rows with the leaves of their cluster, the rows of each cluster are cut into
tiles of R rows, in the same way. `tile_sizes` chooses B and R.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softsphere.engines.grouping import Group, Touched, consecutive, in_one_wait, portions, ranges
from softsphere.engines.tile_sizes import block_and_tile

__all__ = ["Lines", "Tiles"]


class Cut(NamedTuple):
    """The blocks of the U clusters with rows.

    number: (U) how many each has; first: (U) the first of them.
    cluster: (V) which of the U each block is of.
    lines: N, how many lines the rows have with them.
    further: (U) how many products the tiles of each have after the first one.
    products: Σ further.
    """

    number: Tensor
    first: Tensor
    cluster: Tensor
    lines: int
    further: Tensor
    products: int

    @classmethod
    def of(cls, touched: Touched, B: int, R: int) -> Cut:
        """Into blocks of B leaves, and tiles of R rows."""
        number = portions(touched.sizes, B)
        further = number * (portions(touched.rows, R) - 1)
        V, N, products = in_one_wait(number.sum(), (number * touched.rows).sum(), further.sum())
        first = number.cumsum(0) - number
        return cls(number, first, consecutive(number, V), N, further, products)


@dataclass(frozen=True, eq=False)
class Lines:
    """The lines of a group.

    size: B, the leaves of a block. tile: R, the rows of a tile.
    cut: the blocks; None if each is a whole cluster, so that every row has one line.
    leaves: (V, B) the leaves of the blocks.
    padding: (V, B) whether a place is beyond the end of its cluster; None if none is.
    row, block: (N) the row and the block of each line.
    offsets: (n) the first place of each row in the outputs (N B).
    """

    group: Group
    size: int
    tile: int
    cut: Cut | None
    leaves: Tensor
    padding: Tensor | None
    row: Tensor
    block: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, group: Group, width: int) -> Lines:
        """width: d, the numbers of a row."""
        touched = group.touched
        B, R = block_and_tile(touched, width)
        first, of_row, device = touched.starts, touched.of_row, touched.starts.device
        last = first + (touched.sizes - 1)
        if touched.largest <= B:
            cut, row, block = None, torch.arange(len(of_row), device=device), of_row
            offsets = row * B
        else:
            cut = Cut.of(touched, B, R)
            u, lines = cut.cluster, cut.number.index_select(0, of_row)
            number = torch.arange(len(u), device=device) - cut.first.index_select(0, u)
            first, last = first.index_select(0, u) + number * B, last.index_select(0, u)
            row = consecutive(lines, cut.lines)
            block = ranges(cut.first.index_select(0, of_row), lines, cut.lines)
            offsets = (lines.cumsum(0) - lines) * B
        padding, last = None, last.unsqueeze(1)
        leaves = first.unsqueeze(1) + torch.arange(B, device=device)
        if leaves.numel() > touched.leaves:
            padding, leaves = leaves > last, leaves.minimum(last)
        return cls(group, B, R, cut, leaves, padding, row, block, offsets)

    @cached_property
    def leaf(self) -> Tensor:
        """(N B) the leaves of the lines."""
        return self.leaves.index_select(0, self.block).view(-1)

    @cached_property
    def own(self) -> Tensor:
        """(n) the place of the target of each row in the outputs (N B)."""
        touched = self.group.touched
        return self.group.target - touched.starts.index_select(0, touched.of_row) + self.offsets

    @cached_property
    def _padding_of_lines(self) -> Tensor | None:
        return None if self.padding is None else self.padding.index_select(0, self.block)

    def spread(self, x: Tensor) -> Tensor:
        """A value x (L) of each leaf in the layout of the outputs (N, B)."""
        return x.index_select(0, self.leaf).view(-1, self.size)

    def cleared(self, o: Tensor) -> Tensor:
        """Sets what is beyond the end of a cluster in (N, B) to 0, in place."""
        padding = self._padding_of_lines
        return o if padding is None else o.masked_fill_(padding, 0.0)

    def sums_of_rows(self, x: Tensor) -> Tensor:
        """The sums of the lines (N, …) of each row: (n, …)."""
        if self.cut is None:
            return x
        n = len(self.group.cluster)
        return x.new_zeros(n, *x.shape[1:]).index_add_(0, self.row, x)

    def of_rows(self, x: Tensor) -> Tensor:
        """The value x (n) of its row for each line: (N, 1)."""
        return (x if self.cut is None else x.index_select(0, self.row)).unsqueeze(1)

    @cached_property
    def tiles(self) -> Tiles:
        """The tiles of rows for these lines."""
        return Tiles.of(self)


class Tiles(NamedTuple):
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
        touched, cut = lines.group.touched, lines.cut
        R, u = lines.tile, touched.of_row
        first, last = touched.first_row, touched.first_row + (touched.rows - 1)
        number = lines.row if cut is None else torch.arange(len(u), device=u.device)
        within = number - first.index_select(0, u)
        if touched.most_rows <= R:
            further = u[:0]
            if cut is not None:
                first, last = first.index_select(0, cut.cluster), last.index_select(0, cut.cluster)
                within = within.index_select(0, lines.row)
            line = lines.block * R + within
        else:
            first, last, line, further = _several_tiles(lines, within)
        rows = first.unsqueeze(1) + torch.arange(R, device=u.device)
        return cls(rows.minimum(last.unsqueeze(1)), line, further)


def _several_tiles(lines: Lines, within: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first and last row of each product, the places of the lines, and the further blocks.

    within: (n) the number of each row among those of its cluster.
    """
    touched, R = lines.group.touched, lines.tile
    cut = lines.cut or Cut.of(touched, lines.size, R)
    V = len(cut.cluster)
    first_further = cut.further.cumsum(0) - cut.further
    u = consecutive(cut.further, cut.products)
    k = torch.arange(len(u), device=u.device) - first_further.index_select(0, u)
    blocks = cut.number.index_select(0, u)
    tile = F.pad(1 + k.div(blocks, rounding_mode="floor"), (V, 0))
    block = cut.first.index_select(0, u) + k.remainder(blocks)
    u = torch.cat([cut.cluster, u])
    first = touched.first_row.index_select(0, u) + tile * R
    last = (touched.first_row + (touched.rows - 1)).index_select(0, u)
    tile, place = within.div(R, rounding_mode="floor"), within.remainder(R)
    of_row = touched.of_row
    later = (V + first_further - cut.first).index_select(0, of_row)
    later += (tile - 1) * cut.number.index_select(0, of_row)
    shift = torch.where(tile > 0, later, 0) * R + place
    return first, last, lines.block * R + shift.index_select(0, lines.row), block
