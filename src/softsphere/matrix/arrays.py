"""The arrays that are kept of a factored matrix W = V U + 1 ωᵀ, and how W is read from them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from softsphere.matrix.generations import Generations
from softsphere.matrix.precision import Rounded, float32_is_exact, in_full_precision, product
from softsphere.matrix.rows import Rows

__all__ = ["Arrays"]

_SMALL = ("U", "U_inv", "omega", "centred_gram", "colsum")
# The number of rows from which the mean row is estimated before W is read.
_SAMPLE = 256


class Arrays:
    """V, U, U⁻¹, ω, G, w̄ and M of a D × w matrix W = V U + 1 ωᵀ.

    V is (D, w) and large. U, U⁻¹, G (w, w), ω and w̄ (w) are small and always float64. With the base
    measure Π = diag(π), the identity if none is given, M = Σ π, w̄ = Wᵀπ, r = w̄/M is the mean row,
    and G = (W − 1rᵀ)ᵀ Π (W − 1rᵀ), so that a large common row costs G no digits. W may consist of
    several blocks of `width` columns side by side: the weight, and an optimizer's momentum.

    G and w̄ are computed from V when they are first needed. `edition` names the value of W: it
    changes with each change of W, and copies and conversions of W keep it.

    Args:
        V: the rows, which are not copied.
        pi: (D) positive with Σ π = D, or None for one everywhere.
        width: the number of columns of one block of W; None for all of V.
    """

    def __init__(self, V: Rows, pi: Tensor | None = None, width: int | None = None) -> None:
        self.V, self.pi = V, pi
        self.width = V.width if width is None else width
        self.rounded = Rounded()
        self.generations = Generations(V.num_rows, V.width, V.device, self.rounded)
        self.is_written = False
        self.reset_()

    @property
    def device(self) -> torch.device:
        return self.V.device

    @property
    def dtype(self) -> torch.dtype:
        return self.V.dtype

    @property
    def num_rows(self) -> int:
        """D."""
        return self.V.num_rows

    @property
    def blocks(self) -> int:
        """The number of blocks of `width` columns."""
        return self.V.width // self.width

    @property
    def mass(self) -> float:
        """M = Σ π = D, since a prior is normalised."""
        return float(self.num_rows)

    def reset_(self) -> None:
        """Takes V for W: U = I and ω = 0. G and w̄ are computed when they are next needed."""
        self.U = torch.eye(self.V.width, dtype=torch.float64, device=self.device)
        self.U_inv, self.omega = self.U.clone(), torch.zeros_like(self.U[0])
        self.generations.forget(self.V.width)
        self.is_written = True
        self.renamed()
        self.forget_gram()

    def forget_gram(self) -> None:
        """Has G and w̄ computed again when they are next needed."""
        self.known: tuple[Tensor, Tensor] | None = None
        self.changed()

    def changed(self) -> None:
        """Notes that the small arrays have changed, so that they are rounded again."""
        self.rounded.forget(*_SMALL, "mean")

    def renamed(self) -> None:
        """Notes that W has changed."""
        self.edition = uuid.uuid4().hex

    def begin_change(self) -> None:
        """Prepares for writing: tensors that were handed out keep their values."""
        self.check()
        self.V.own()
        self.is_written = False

    def check(self) -> None:
        """Notices changes of V in place by others.

        Where V is W itself, as after `state_dict()`, the change is adopted, and G and w̄ are
        computed again.

        Raises RuntimeError where V is not W, so that the change has no meaning.
        """
        if not self.V.changed_by_others():
            return
        if not self.is_written:
            raise RuntimeError(
                "the rows of a factored weight were changed in place by other means than its own "
                "operations; change it by head.load_state_dict(…) or torch.nn.init, which write "
                "the whole weight"
            )
        self.V.note()
        self.renamed()
        self.forget_gram()

    @property
    def gram(self) -> Tensor:
        """Q = Wᵀ Π W = G + M r rᵀ (w, w), as a new tensor."""
        return torch.addr(self.centred_gram, self.colsum, self.mean)

    @property
    def centred_gram(self) -> Tensor:
        """G (w, w), the Gram matrix under π of the rows less their mean row."""
        return self.sums()[0]

    @property
    def colsum(self) -> Tensor:
        """w̄ = Wᵀ π (w)."""
        return self.sums()[1]

    @property
    def mean(self) -> Tensor:
        """r = w̄ / M (w), the mean row under π, as a new tensor."""
        return self.colsum / self.mass

    def sums(self) -> tuple[Tensor, Tensor]:
        """Returns G and w̄. They cost O(D w²) the first time, and are kept through steps."""
        if self.known is None:
            self.known = self.computed_sums()
        return self.known

    @in_full_precision
    def computed_sums(self) -> tuple[Tensor, Tensor]:
        """Computes G and w̄ from the rows of W.

        A large common row would cost G its digits. An estimate of the mean row is therefore taken
        off before the rows are multiplied, and the rest of the mean row afterwards.
        """
        gram, rest = torch.zeros_like(self.U), torch.zeros_like(self.omega)
        step = max(1, self.num_rows // _SAMPLE)
        sample = self.rows(torch.arange(0, self.num_rows, step, device=self.device))
        # Written like this, it is exact where all rows are equal.
        near_mean = sample[0] + torch.cat([x.mean(0) for x in self.split(sample - sample[0])])
        for part, rows in self.chunks():
            shifted = self.split(rows - near_mean)
            pi = None if self.pi is None else self.pi[part].unsqueeze(1)
            weighted = shifted if pi is None else [x * pi for x in shifted]
            gram += torch.cat([torch.cat([product(x.mT, y) for y in shifted], 1) for x in weighted])
            rest += torch.cat([x.sum(0, dtype=torch.float64) for x in weighted])
        # addr may round the last columns differently from the first.
        gram = (gram + gram.mT) / 2 - torch.outer(rest, rest / self.mass)
        return gram, rest + self.mass * near_mean

    def split(self, rows: Tensor) -> list[Tensor]:
        """Returns the blocks of rows (n, w).

        Sums of one block then have the same digits whether or not another stands beside it.
        """
        return [x.contiguous() for x in rows.split(self.width, 1)]

    def small(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a small array in float64 or in the dtype of V, valid until the next step."""
        if dtype == torch.float64:
            exact: Tensor = getattr(self, name)
            return exact
        return self.rounded.get(name, self.dtype, lambda: getattr(self, name))

    def block(self, j: int) -> slice:
        """Returns the columns of block j."""
        return slice(j * self.width, (j + 1) * self.width)

    def rows(self, index: Tensor, columns: slice = slice(None)) -> Tensor:
        """W[index]: (n, w)."""
        return self.outputs(self.coordinates(index), columns)

    @in_full_precision
    def centred_rows(self, index: Tensor) -> Tensor:
        """W[index] of the first block less the mean row, which is taken off in float64: (n, d)."""
        rows = self.rows(index, self.block(0))
        return (rows - self.mean[: self.width]).to(rows.dtype)

    @in_full_precision
    def outputs(self, coordinates: Tensor, columns: slice = slice(None)) -> Tensor:
        """Computes rows of W from their current coordinates (n, w)."""
        omega, U = self.small("omega")[columns], self.small("U")[:, columns]
        if float32_is_exact() or U.dtype == torch.float64:
            return torch.addmm(omega, coordinates, U)
        return product(coordinates, self.U[:, columns]) + omega

    @in_full_precision
    def coordinates(self, index: Tensor | slice) -> Tensor:
        """Returns V[index] in the current coordinates, from which U and ω make W[index]."""
        return self.generations.carried(self.V[index], self.generations.made[index])

    def chunks(
        self, size: int | None = None, columns: slice = slice(None)
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of rows, W there) over all rows, in pieces of `size` rows or some MiB."""
        for part in self.V.chunks(size):
            rows = self.V[part][:, columns] if self.is_written else None
            yield part, self.outputs(self.coordinates(part), columns) if rows is None else rows

    @in_full_precision
    def times(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of rows, W x there) for x (w, p), in float64. O(D w p) a generation."""
        each = self.generations.maps @ (self.U @ x)
        flat, shift = each.transpose(0, 1).flatten(1), self.omega @ x
        for part in self.V.chunks():
            made = self.generations.made[part].long()
            by_each = self.V.times(part, flat).view(len(made), len(each), -1)
            yield part, shift + by_each[torch.arange(len(made), device=made.device), made]

    def to_dense(self, chunk: int | None = None, columns: slice = slice(None)) -> Tensor:
        """Returns W, or columns of it, as a new tensor (D, w)."""
        width = len(range(*columns.indices(self.V.width)))
        dense = torch.empty(self.num_rows, width, dtype=self.dtype, device=self.device)
        for part, rows in self.chunks(chunk, columns):
            dense[part] = rows
        return dense

    @in_full_precision
    def rewrite_(self, j: int, change: Callable[[slice, Tensor], Tensor]) -> None:
        """Replaces block j of W by change(part, its rows there), in row chunks. O(D w²).

        V must be W; see `FactoredMatrix.canonical_`.
        """
        columns = self.block(j)
        for part in self.V.chunks():
            rows = self.V[part]
            new = change(part, rows[:, columns])
            rows = rows.clone()
            rows[:, columns] = new
            self.V[part] = rows
        self.renamed()
        self.forget_gram()

    def copied(self, device: torch.device, dtype: torch.dtype) -> Arrays:
        """Copies a matrix of one block, factor by factor, to a device and a dtype."""
        pi = self.pi
        if pi is not None:
            pi = pi.to(device if device.type != "meta" else pi.device, dtype, copy=True)
            if dtype == torch.float64 and self.dtype == torch.float32:
                # Otherwise Σ π = D would hold only to float32.
                pi *= self.mass / pi.sum()
        other = Arrays(Rows(*self.V.to(device, dtype)), pi, self.width)
        other.generations = self.generations.copied(device, other.rounded)
        for name in ("U", "U_inv", "omega"):
            setattr(other, name, getattr(self, name).to(device, copy=True))
        if self.known is not None and dtype == self.dtype and device.type != "meta":
            other.known = (
                self.known[0].to(device, copy=True),
                self.known[1].to(device, copy=True),
            )
        other.edition, other.is_written = self.edition, self.is_written
        return other

    def state(self) -> dict[str, Tensor]:
        """Returns every array, for comparison."""
        V = torch.cat(self.V.blocks, 1)
        return {"V": V, **{name: getattr(self, name) for name in _SMALL}}
