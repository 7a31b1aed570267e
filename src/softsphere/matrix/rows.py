"""V, the large array: D rows, kept as blocks of columns side by side.

A layer's weight, its bias and an optimizer's momentum are a block each, so that each can be handed
out as an ordinary contiguous tensor without a copy. The caller may keep such a tensor or change it:

* `lend` hands a block out. Before V is next written, a block that is still referred to elsewhere is
  copied, so that the tensor that was handed out keeps its values.
* A change that the caller makes in place is noticed by the version of the block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from softsphere._torch import is_shared_with_others, version_of
from softsphere.equal_indices import Places
from softsphere.matrix.refusals import refuse_in_record
from softsphere.unread import step_is_recorded

__all__ = ["Rows"]

# The size of the pieces in which all rows are read or written: on a CPU about that of its cache, on
# a GPU so large that reading a piece takes longer than launching what is done with it.
_CHUNK_BYTES, _CHUNK_BYTES_OF_GPU = 8 << 20, 64 << 20


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is equal to NaN here."""
    return one.is_meta or bool(((one == two) | (one.isnan() & two.isnan())).all())


def _taken(block: Tensor, index: Tensor | slice) -> Tensor:
    # A CPU copies whole rows by index_select, and number by number by block[index].
    return block.index_select(0, index) if isinstance(index, Tensor) else block[index]


class Rows:
    """V (D, w) as blocks (D, w_j) of one dtype and device.

    >>> V = Rows(torch.ones(3, 2), torch.zeros(3, 1))
    >>> V[torch.tensor([1])]
    tensor([[1., 1., 0.]])
    """

    def __init__(self, *blocks: Tensor) -> None:
        with torch.inference_mode(False):
            # Changes of a tensor that inference mode has made are not counted.
            self.blocks = [
                (block.clone() if block.is_inference() else block.detach()).contiguous()
                for block in blocks
            ]
        # a sample of the rows of each block that was lent, by the number of the block
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
        return [version_of(block) for block in self.blocks]

    def note(self) -> None:
        """Notes the present state of the blocks, from which later changes are told."""
        self.written = self.versions()
        self.lent = {j: self.sample(j) for j in self.lent}

    def changed_by_others(self) -> bool:
        """Whether a block has been changed in place since it was last written here."""
        if self.versions() != self.written:
            return True
        # Writing through `.data` or NumPy changes no version.
        return any(not _same(rows, self.sample(j)) for j, rows in self.lent.items())

    def sample(self, j: int) -> Tensor:
        """Returns a copy of some rows of block j."""
        return self.blocks[j][:: max(1, self.num_rows // 64)].clone()

    def lend(self, j: int) -> Tensor:
        """Hands block j out. The tensor keeps its present values while V changes."""
        refuse_in_record()
        self.lent[j] = self.sample(j)
        return self.blocks[j].detach()

    def own(self) -> None:
        """Copies blocks that were lent and are still referred to, so that V can be written."""
        with torch.inference_mode(False):
            for j in self.lent:
                if is_shared_with_others(self.blocks[j]):
                    self.blocks[j] = self.blocks[j].clone()
        if self.lent:
            self.lent = {}
            self.note()

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Rows (n, w)."""
        parts = [_taken(block, index) for block in self.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def __setitem__(self, index: Tensor | slice, values: Tensor) -> None:
        for block, part in self.parts(values):
            if isinstance(index, Tensor):
                block.index_copy_(0, index, part)  # faster than index_put_
            else:
                block[index] = part
        self.note()

    def add(self, index: Tensor, values: Tensor, places: Places | None = None) -> None:
        """V[index] += values, where the index may repeat. places: of the index, if known.

        The values of a row are summed in their own dtype, float64 or that of V, and added once: one
        by one, they would be lost where each is smaller than the last digit of the row.
        """
        places = Places.of(index) if places is None else places
        if step_is_recorded():
            # equal rows get equal values, which a compiled program writes without atomic additions
            self[index] = self[index] + places.sums_for_each(values).to(self.dtype)
            return
        for block, part in self.parts(places.sums(values)):
            block.index_add_(0, places.index, part.to(block.dtype))
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
        """The number of rows that take some MiB, at least one."""
        size = _CHUNK_BYTES if self.device.type == "cpu" else _CHUNK_BYTES_OF_GPU
        return max(1, size // (self.width * self.blocks[0].element_size()))

    def chunks(self, size: int | None = None) -> Iterator[slice]:
        """Yields slices that cover all rows, of `size` rows each."""
        size = size or self.chunk_size()
        for start in range(0, self.num_rows, size):
            yield slice(start, min(start + size, self.num_rows))

    def to(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Returns copies of the blocks on a device and in a dtype."""
        return [block.to(device, dtype, copy=True) for block in self.blocks]
