"""The arrays that are kept of a stack of factored matrices, and how W is read from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softsphere.matrix.abstract import POWER, Kept
from softsphere.matrix.precision import in_full_precision, product
from softsphere.matrix.rows import Rows
from softsphere.matrix.segments import Segments
from softsphere.rounding import MOST_TERMS

__all__ = ["StackArrays"]

# The rows of a matrix from which its mean row is estimated before its sums are computed.
_SAMPLE = 8
# Up to this number of rows, rounding a map to their dtype costs more than the product in float64.
_FEW = 32


class StackArrays(Kept):
    """V and π, and U, U⁻¹, ω, G and w̄ of each of C matrices W_c = V_c U_c + 1 ω_cᵀ.

    The rows of W_c are those from starts[c] to starts[c + 1] of V (D, w). All other arrays have a
    leading dimension C and are float64; they mean what they mean in `Arrays`, with M_c = Σ π over
    the rows of W_c, which is their number, since π is normalised in each matrix.

    W_c stands multiplied by scale[c] in all arrays but V: those that are stored are the ones of
    W_c / scale[c]. A factor for all of W, as weight decay is, so costs one number a matrix.

    A row may be written in older coordinates, `old`; then it is W_k = V_k maps_c U_c + ω_c. When
    U_c is replaced by P, maps_c takes U_c P⁻¹ up, so that no old row is read. An old row is carried
    over when it is next a target.

    Args:
        V: the rows, which are not copied.
        starts: (C + 1) from 0 to D.
        pi: (D) positive, with a sum over each matrix that is its number of rows; None for ones.
    """

    starts: Tensor

    def __init__(self, V: Rows, starts: Tensor, pi: Tensor | None = None) -> None:
        self.V, self.pi, self.width = V, pi, V.width
        self.starts = starts
        self.old = torch.zeros(V.num_rows, dtype=torch.bool, device=V.device)
        self.is_written = False
        self.reset_()

    @property
    def count(self) -> int:
        """C."""
        return len(self.starts) - 1

    @property
    def sizes(self) -> Tensor:
        """The number of rows of each matrix: (C)."""
        return self.starts.diff()

    @property
    def mass(self) -> Tensor:
        """M_c: (C) float64, at least 1 so that matrices without rows have a mean row, zero."""
        return self.sizes.double().clamp_min(1)

    def all_ids(self) -> Tensor:
        return torch.arange(self.count, device=self.device)

    def reset_(self) -> None:
        eye = torch.eye(self.width, dtype=torch.float64, device=self.device)
        self.U = eye.repeat(self.count, 1, 1)
        self.U_inv = self.U.clone()
        self.omega = eye.new_zeros(self.count, self.width)
        self.scale, self.is_scaled = eye.new_ones(self.count), False
        self.old.zero_()
        self.maps: Tensor | None = None
        self.has_map = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        self.is_written = True
        self.renamed()
        self.forget_gram()

    def forget_gram(self) -> None:
        self.known: tuple[Tensor, Tensor] | None = None

    @property
    def centred_gram(self) -> Tensor:
        """G_c as it is stored: (C, w, w)."""
        return self.sums()[0]

    @property
    def colsum(self) -> Tensor:
        """w̄_c as it is stored: (C, w)."""
        return self.sums()[1]

    def sums(self) -> tuple[Tensor, Tensor]:
        """Returns G and w̄ as stored. They cost O(D w²) the first time, and are kept in steps."""
        if self.known is None:
            self.fold(self.all_ids())
            self.known = self.computed_sums(self.all_ids())
        return self.known

    def fold(self, ids: Tensor) -> None:
        """Takes the scales of some matrices into their arrays."""
        if not self.is_scaled or bool((self.scale[ids] == 1).all()):
            return
        for name in POWER:
            if self.known is not None or name in ("U", "U_inv", "omega"):
                array: Tensor = getattr(self, name)
                array.index_copy_(0, ids, self.of(name, ids))
        self.scale[ids] = 1.0

    def _powers(self, name: str, scale: Tensor) -> Tensor:
        """The factors (k, 1, …) of a small array for these scales (k)."""
        array: Tensor = getattr(self, name)
        return (scale ** POWER[name]).reshape(-1, *[1] * (array.dim() - 1))

    def of(self, name: str, ids: Tensor) -> Tensor:
        """Returns a small array of some matrices: (k, …)."""
        array: Tensor = getattr(self, name)
        taken = array.index_select(0, ids)
        return taken * self._powers(name, self.scale[ids]) if self.is_scaled else taken

    def multiply(self, factor: float) -> None:
        """Multiplies all of W by a number."""
        self.scale *= factor
        self.is_scaled = True

    def add(self, ids: Tensor, increments: dict[str, Tensor]) -> None:
        """Adds to every small array of some matrices (k, …), each of which occurs once."""
        self.fold(ids)
        for name, increment in increments.items():
            array: Tensor = getattr(self, name)
            array.index_add_(0, ids, increment)

    def mean(self, ids: Tensor) -> Tensor:
        """r_c = w̄_c / M_c (k, w)."""
        return self.of("colsum", ids) / self.mass[ids].unsqueeze(1)

    def squares(self) -> Tensor:
        spread = self.centred_gram.diagonal(dim1=1, dim2=2)
        own = spread + self.colsum.square() / self.mass.unsqueeze(1)
        return (own * self.scale.square().unsqueeze(1)).sum(0)

    def sums_are_finite(self) -> bool:
        return bool(self.squares().isfinite().all())

    def local(self, ids: Tensor) -> Tensor:
        """The place within `ids` of each matrix: (C), for those that are in it."""
        places = torch.zeros(self.count, dtype=torch.long, device=self.device)
        places[ids] = torch.arange(len(ids), device=self.device)
        return places

    def split(self, ids: Tensor) -> Sequence[Tensor]:
        """Splits matrices into parts whose w × w arrays take some MiB."""
        parts: Sequence[Tensor] = ids.split(max(1, self.V.chunk_size() // self.width))
        return parts

    def cluster_of(self, rows: Tensor) -> Tensor:
        """The matrix that each row belongs to (n)."""
        return torch.searchsorted(self.starts, rows, right=True) - 1

    def segments(self, ids: Tensor) -> Segments:
        """The rows of V of some matrices."""
        return Segments(ids, self.starts[ids], self.sizes[ids])

    @in_full_precision
    def rows(self, index: Tensor | slice, columns: slice = slice(None)) -> Tensor:
        V = self.V[index]
        if self.is_written:
            return V[:, columns]
        out = V[:, columns].clone()
        old = self.old[index]
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.num_rows), device=self.device)
        for piece in Segments.of(self.cluster_of(index)).pieces(self.width):
            rows = self.outputs(piece.ids, piece.take(V), piece.take(old))
            piece.put(rows[..., columns], out)
        return out

    @in_full_precision
    def outputs(self, ids: Tensor, V: Tensor, old: Tensor) -> Tensor:
        """Computes rows of W_c from rows of V (k, p, w), some of which are old (k, p)."""
        if self.is_written:
            return V
        current = _times(self.carried(ids, V, old), self.of("U", ids))
        return current + self.of("omega", ids).unsqueeze(1).to(current.dtype)

    @in_full_precision
    def carried(self, ids: Tensor, V: Tensor, old: Tensor) -> Tensor:
        """Takes rows of V (k, p, w) to the current coordinates."""
        if self.maps is None or not bool(old.any()):
            return V
        return torch.where(old.unsqueeze(-1), _times(V, self.maps.index_select(0, ids)), V)

    @in_full_precision
    def computed_sums(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Computes G and w̄ of some matrices from their rows. O(w²) a row.

        A large common row would cost G its digits. An estimate of the mean row is therefore taken
        off before the rows are multiplied, and the rest of the mean row afterwards.
        """
        w = self.width
        gram = torch.zeros(len(ids), w, w, dtype=torch.float64, device=self.device)
        rest = gram.new_zeros(len(ids), w)
        near = torch.cat([self._near_mean(some) for some in ids.split(1024)])
        local = self.local(ids)
        for piece in self.segments(ids).pieces(w, min(self.V.chunk_size(), MOST_TERMS)):
            at, flat = local[piece.ids], piece.index.flatten()
            V = self.V[flat].view(*piece.index.shape, w)
            shifted = self.outputs(piece.ids, V, self.old[piece.index]) - near[at].unsqueeze(1)
            if piece.real is not None:
                shifted.masked_fill_(~piece.real.unsqueeze(2), 0.0)
            weighted = shifted
            if self.pi is not None:
                weighted = shifted * self.pi[piece.index].unsqueeze(2)
            gram.index_add_(0, at, product(shifted.mT, weighted).double())
            rest.index_add_(0, at, weighted.sum(1, dtype=torch.float64))
        gram = (gram + gram.mT) / 2
        mass = self.mass[ids].unsqueeze(1)
        gram -= rest.unsqueeze(2) * (rest / mass).unsqueeze(1)
        is_empty = (self.sizes[ids] == 0).unsqueeze(1)
        return gram, rest + torch.where(is_empty, 0.0, mass * near)

    def _near_mean(self, ids: Tensor) -> Tensor:
        """An estimate of the mean row of each matrix (k, w), exact where all rows are equal."""
        if not self.num_rows:
            return torch.zeros(len(ids), self.width, dtype=self.dtype, device=self.device)
        step = torch.arange(_SAMPLE, device=self.device)
        at = self.starts[ids].unsqueeze(1) + step * self.sizes[ids].unsqueeze(1) // _SAMPLE
        at = at.clamp_max(self.num_rows - 1)  # of a matrix without rows
        sample = self.rows(at.flatten()).view(len(ids), _SAMPLE, self.width)
        first = sample[:, :1]
        return (first + (sample - first).mean(1, keepdim=True)).squeeze(1)

    def copied(self, device: torch.device, dtype: torch.dtype) -> StackArrays:
        """Copies the stack, factor by factor, to a device and a dtype."""
        pi = self.pi
        if pi is not None:
            pi = pi.to(device if device.type != "meta" else pi.device, dtype, copy=True)
        at = self.starts.device if device.type == "meta" else device
        starts = self.starts.to(at, copy=True)
        other = StackArrays(Rows(*self.V.to(device, dtype)), starts, pi)
        for name in ("U", "U_inv", "omega", "scale", "old", "has_map"):
            setattr(other, name, getattr(self, name).to(device, copy=True))
        if self.maps is not None:
            other.maps = self.maps.to(device, copy=True)
        if self.known is not None and dtype == self.dtype and device.type != "meta":
            gram, colsum = self.known
            other.known = gram.to(device, copy=True), colsum.to(device, copy=True)
        other.edition, other.is_written = self.edition, self.is_written
        other.is_scaled = self.is_scaled
        return other


def _times(rows: Tensor, maps: Tensor) -> Tensor:
    """Rows (k, p, w) times the float64 maps (k, w, w), in the dtype of the rows."""
    if rows.shape[1] > _FEW:
        return product(rows, maps)
    return (rows.double() @ maps).to(rows.dtype)
