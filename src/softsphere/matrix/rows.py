"""V, the large array: D rows, kept as blocks of columns side by side.

A layer's weight, its bias and an optimizer's momentum are a block each, so that each can be handed
out as an ordinary contiguous tensor without a copy. Whoever has one may keep it, or change it:

* `lend` hands a block out. Before V is next written, a block that somebody still refers to is
  copied, so that what was handed out stays as it was.
* A change that somebody else made in place is noticed by the block's version.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softsphere._torch import is_shared_with_others

__all__ = ["Rows"]

CHUNK_BYTES = 8 << 20


def same(one: Tensor, two: Tensor) -> bool:
    """Whether all numbers are, or both are none."""
    return one.is_meta or bool(((one == two) | (one.isnan() & two.isnan())).all())


class Rows:
    """V (D, w) as blocks (D, w_j) of one dtype and device.

    >>> V = Rows(torch.ones(3, 2), torch.zeros(3, 1))
    >>> V[torch.tensor([1])]
    tensor([[1., 1., 0.]])
    """

    def __init__(self, *blocks: Tensor) -> None:
        self.blocks = [block.detach().contiguous() for block in blocks]
        # some rows of each block that was lent, as they were
        self.lent: dict[int, Tensor] = {}
        self.note()

    @property
    def num_rows(self) -> int:
        """D."""
        return self.blocks[0].shape[0]

    @property
    def width(self) -> int:
        """w."""
        return sum(block.shape[1] for block in self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device

    def versions(self) -> list[int]:
        return [0 if block.is_inference() else block._version for block in self.blocks]

    def note(self) -> None:
        """Takes the blocks as they are for what was written last."""
        self.written = self.versions()
        self.lent = {j: self.sample(j) for j in self.lent}

    def changed_by_others(self) -> bool:
        """Whether a block has been changed in place since it was last written here."""
        if self.versions() != self.written:
            return True
        # what `.data` or NumPy write has no version
        return any(not same(rows, self.sample(j)) for j, rows in self.lent.items())

    def sample(self, j: int) -> Tensor:
        """Some rows of block j."""
        return self.blocks[j][:: max(1, self.num_rows // 64)].clone()

    def lend(self, j: int) -> Tensor:
        """Block j, as it is now for whoever gets it."""
        self.lent[j] = self.sample(j)
        return self.blocks[j].detach()

    def own(self) -> None:
        """Copies what was lent and is still referred to, so that V can be written."""
        with torch.inference_mode(False):
            for j in self.lent:
                if is_shared_with_others(self.blocks[j]):
                    self.blocks[j] = self.blocks[j].clone()
        if self.lent:
            self.lent = {}
            self.note()

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Rows (n, w)."""
        if len(self.blocks) == 1:
            return self.blocks[0][index]
        return torch.cat([block[index] for block in self.blocks], 1)

    def __setitem__(self, index: Tensor | slice, values: Tensor) -> None:
        for block, part in self.parts(values):
            if isinstance(index, Tensor):
                block.index_copy_(0, index, part)  # faster than index_put_
            else:
                block[index] = part
        self.note()

    def add(self, index: Tensor, values: Tensor) -> None:
        """V[index] += values, index may repeat."""
        for block, part in self.parts(values):
            block.index_add_(0, index, part)
        self.note()

    def parts(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each block with its columns of values (n, w)."""
        if len(self.blocks) == 1:
            return iter([(self.blocks[0], values)])
        return zip(self.blocks, values.split([x.shape[1] for x in self.blocks], 1), strict=True)

    def times(self, part: slice, x: Tensor) -> Tensor:
        """V[part] x for x (w, p), in the dtype of x."""
        pieces = x.split([block.shape[1] for block in self.blocks])
        products = [
            block[part].to(x.dtype) @ piece
            for block, piece in zip(self.blocks, pieces, strict=True)
        ]
        return torch.stack(products).sum(0)

    def chunk_size(self) -> int:
        """Rows whose bytes are CHUNK_BYTES, at least one."""
        return max(1, CHUNK_BYTES // (self.width * self.blocks[0].element_size()))

    def chunks(self, size: int | None = None) -> Iterator[slice]:
        """Slices of all rows."""
        size = size or self.chunk_size()
        for start in range(0, self.num_rows, size):
            yield slice(start, min(start + size, self.num_rows))

    def to(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """New blocks there."""
        return [block.to(device, dtype, copy=True) for block in self.blocks]
