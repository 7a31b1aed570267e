"""Predictions from a factored weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from softsphere import losses
from softsphere._torch import is_recorded, transformed
from softsphere.engines.factored_outputs import constant_in_transforms, factored_outputs
from softsphere.engines.factored_statistics import factored_statistics
from softsphere.heads.row_keys import keys_of_rows
from softsphere.heads.weight_reader import WeightReader
from softsphere.matrix import FactoredTensor
from softsphere.matrix.arrays import Arrays
from softsphere.matrix.factored_matrix import single_matrix
from softsphere.matrix.turns import turn

__all__ = ["EXPORT", "FactoredReader"]

EXPORT = (
    "a factored layer keeps its weight in factors, which neither an exported program nor a "
    "compiled graph can hold; export head.to_linear() followed by log_prob or predict of "
    "softsphere.SphericalLoss(head.loss, prior=…), or a LinearSphericalLoss with the same "
    "state_dict(), and compile the model around it"
)


class FactoredReader(WeightReader):
    """A reader of a factored [W b] (D, w)."""

    def __init__(self, weight: FactoredTensor, in_features: int, loss: losses.Loss) -> None:
        W = weight.matrix.arrays
        super().__init__(loss, in_features, W.num_rows, W.pi, W.device)
        self.weight = weight

    @property
    def columns(self) -> slice:
        """The columns of [W b] among all that the factors hold, momentum included."""
        return self.weight.matrix.arrays.block(0)

    def arrays(self) -> Arrays:
        """The factors of [W b].

        Raises RuntimeError if they were changed in another way than through the weight.
        """
        W = single_matrix(self.weight.block).arrays
        W.check()
        return W

    def rows_of(self, hidden: Tensor) -> Tensor:
        """See `Reader.rows_of`."""
        W = self.weight.matrix.arrays
        H = hidden.reshape(-1, self.in_features).to(W.dtype)
        has_bias = W.width > self.in_features
        return nn.functional.pad(H, (0, 1), value=1.0) if has_bias else H

    def weight_rows(self, classes: Tensor) -> Tensor:
        return self.arrays().rows(classes, self.columns)

    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        return self.arrays().chunks(size, self.columns)

    def row_keys(self, classes: Tensor | slice) -> Tensor:
        """See `Reader.row_keys`. Rows of W are equal if they are so in the factor V."""
        with turn():
            W = self.arrays()
            columns = self.columns if W.is_written else slice(None)
            return keys_of_rows(W.V[classes][:, columns]) ^ W.generations.made[classes].long()

    def outputs(self, H: Tensor, classes: Tensor | None = None) -> Tensor:
        if not transformed():
            return factored_outputs(H, self.weight, classes)
        if classes is not None:
            return constant_in_transforms(H @ self.weight_rows(classes).mT, self.weight)
        parts = [H @ rows.mT for _, rows in self.arrays().chunks(columns=self.columns)]
        return constant_in_transforms(torch.cat(parts, 1), self.weight)

    def is_differentiated(self, hidden: Tensor) -> bool:
        return is_recorded(hidden, self.weight)

    def log_normaliser(self, H: Tensor) -> Tensor:
        """See `Reader.log_normaliser`. It is computed from Q and w̄."""
        if not isinstance(self.loss, losses.Normalised):
            return H.new_zeros(len(H))
        if transformed():
            return constant_in_transforms(self.log_normaliser_of_outputs(H), self.weight)
        none = torch.empty(len(H), 0, dtype=torch.long, device=H.device)
        x = factored_statistics(H, self.weight, none, centred=False)
        return self.loss.log_normaliser(x.s, x.q, x.mass)
