"""The small arrays of a factored matrix W = V U + 1 ωᵀ, and how a step changes them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from softsphere._torch import add_each, copies
from softsphere.matrix.abstract import Kept
from softsphere.matrix.precision import Rounded, is_asynchronous
from softsphere.matrix.small_matrix import SmallMatrix

__all__ = ["SmallArrays"]

_SMALL = ("U", "U_inv", "omega", "centred_gram", "colsum")
_MATRICES = ("U", "U_inv", "centred_gram")
_MEAN = "mean in float64"


class SmallArrays(Kept):
    """U, U⁻¹, ω, G and w̄ beside the rows V; see `Arrays`, which computes the last two from V.

    All are float64. What steps add to the matrices may be summed apart for a while, see
    `SmallMatrix`. `rounded` keeps copies in the dtype of V.
    """

    matrices: dict[str, SmallMatrix]
    omega: Tensor
    rounded: Rounded

    def begin(self) -> None:
        """U = I and ω = 0; G and w̄ are not known."""
        eye = torch.eye(self.V.width, dtype=torch.float64, device=self.device)
        self.matrices = {"U": SmallMatrix(eye), "U_inv": SmallMatrix(eye.clone())}
        self.omega = torch.zeros_like(eye[0])

    @property
    def mass(self) -> float:
        """M = Σ π = D, since a prior is normalised."""
        return float(self.all_rows)

    @abstractmethod
    def computed_sums(self) -> tuple[Tensor, Tensor]:
        """Computes G and w̄ from the rows of W."""

    def forget_gram(self) -> None:
        """Has G and w̄ computed again when they are next needed."""
        self.matrices.pop("centred_gram", None)
        self.changed()

    def changed(self) -> None:
        """Notes that the small arrays have changed, so that they are rounded again."""
        self.rounded.forget(*_SMALL, "mean", _MEAN)

    def let_last(self) -> None:
        """Has recorded steps round those matrices themselves that are rounded now."""
        self.rounded.lasting = frozenset(_MATRICES) & self.rounded.kept.keys()

    def round_again(self) -> list[Tensor]:
        """Returns the copies that last from one recorded step to the next, with their values."""
        return [self.small(name) for name in sorted(self.rounded.lasting)]

    @property
    def U(self) -> Tensor:
        """U (w, w); it may be a new tensor, so write it by `put`."""
        return self.matrix("U").value

    @property
    def U_inv(self) -> Tensor:
        """U⁻¹ (w, w), as U."""
        return self.matrix("U_inv").value

    @property
    def gram(self) -> Tensor:
        """Q = Wᵀ Π W = G + M r rᵀ (w, w), as a new tensor."""
        return torch.addr(self.centred_gram, self.colsum, self.mean)

    @property
    def centred_gram(self) -> Tensor:
        """G (w, w), the Gram matrix under π of the rows less their mean row, as U."""
        return self.matrix("centred_gram").value

    @property
    def colsum(self) -> Tensor:
        """w̄ = Wᵀ π (w)."""
        self.know_sums()
        return self._colsum

    @property
    def mean(self) -> Tensor:
        """r = w̄ / M (w), the mean row under π, valid until the next step."""
        return self.rounded.get(_MEAN, torch.float64, lambda: (self.colsum / self.mass,))

    @property
    def sums_known(self) -> bool:
        """Whether G and w̄ are known."""
        return "centred_gram" in self.matrices

    def know_sums(self) -> None:
        """Computes G and w̄ unless they are known: O(D w²). They are kept through steps."""
        if not self.sums_known:
            self.set_sums(*self.computed_sums())

    def set_sums(self, gram: Tensor, colsum: Tensor) -> None:
        """Takes these for G and w̄."""
        self._colsum = colsum
        self.matrices["centred_gram"] = SmallMatrix(gram)

    def squares(self) -> Tensor:
        return self.gram.diagonal()

    def sums_are_finite(self) -> bool:
        return bool((self.centred_gram.diagonal() + self.colsum).isfinite().all())

    def small(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a small array in float64 or in the dtype of V, valid until the next step."""
        if dtype == torch.float64:
            exact: Tensor = getattr(self, name)
            return exact
        return self.rounded.get(name, self.dtype, lambda: self._parts(name))

    def _parts(self, name: str) -> tuple[Tensor, ...]:
        """A small array in float64, or two in the dtype of V whose sum it is."""
        if name not in _MATRICES:
            return (getattr(self, name),)
        return self.matrix(name).rounded_parts(self.dtype)

    def matrix(self, name: str) -> SmallMatrix:
        """U, U⁻¹ or G, as it is kept."""
        if name == "centred_gram":
            self.know_sums()
        return self.matrices[name]

    def diagonal(self, name: str) -> Tensor:
        """The diagonal of U, U⁻¹ or G (w)."""
        return self.matrix(name).diagonal

    def put(self, name: str, value: Tensor) -> None:
        """Sets a small array, in the memory that it has."""
        if name in _MATRICES:
            self.matrix(name).put(value)
        else:
            getattr(self, name).copy_(value)

    def scale(self, name: str, factor: float | Tensor) -> None:
        """Multiplies a small array by a number."""
        if name in _MATRICES:
            self.matrix(name).settle()
        getattr(self, name).mul_(factor)

    def add(self, increments: Mapping[str, Tensor], share: float, *, apart: bool) -> None:
        """Adds to the small arrays what a step of this smallest pivot adds.

        apart: whether increments in float32 are summed apart, see `SmallMatrix`. It does not pay
            where the arrays are multiplied in every step.
        """
        now = {}
        for name, x in increments.items():
            if name in _MATRICES and apart and x.dtype != torch.float64:
                self.matrix(name).add(x, share)
            else:
                now[name] = x
        self.settle(now)
        wide = list(now.values())
        if is_asynchronous(self.device) and any(x.dtype != torch.float64 for x in wide):
            wide = copies(wide, torch.float64)
        add_each([getattr(self, name) for name in now], wide)

    def widen(self, basis: Tensor) -> None:
        """U ← basis ⊗ U for basis (2, 2), with 0 as ω of the new columns."""
        back = torch.linalg.inv(basis).contiguous()
        for name, map_of_blocks in (("U", basis), ("U_inv", back)):
            old = self.matrices[name].value.contiguous()
            self.matrices[name] = SmallMatrix(torch.kron(map_of_blocks, old))
        self.omega = torch.nn.functional.pad(self.omega, (0, self.width))

    def settle(self, names: Iterable[str] = _MATRICES) -> None:
        """Adds what was summed apart."""
        for name in names:
            if name in self.matrices:
                self.matrices[name].settle()

    def copy_small_to(self, other: SmallArrays, device: torch.device, *, sums: bool) -> None:
        """Gives another matrix copies of them on a device. sums: whether G and w̄ are among them."""
        for name, matrix in self.matrices.items():
            if sums or name != "centred_gram":
                other.matrices[name] = matrix.copied(device)
        other.omega = self.omega.to(device, copy=True)
        if other.sums_known:
            other._colsum = self._colsum.to(device, copy=True)

    def small_state(self) -> dict[str, Tensor]:
        """Returns each of them, for comparison."""
        return {name: getattr(self, name) for name in _SMALL}
