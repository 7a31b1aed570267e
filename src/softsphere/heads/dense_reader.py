"""Predictions from W and b that are tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import losses
from softsphere._torch import exporting, is_recorded, transformed
from softsphere.engines import LinearSphericalOptions
from softsphere.engines.chunked import CHUNKED
from softsphere.engines.dispatch import settings
from softsphere.engines.engine import Inputs
from softsphere.engines.gram import guarded_statistics
from softsphere.engines.repeated_rows import repeated_rows
from softsphere.engines.row_statistics import wide_dtype
from softsphere.engines.weight import chunks, recorded_in
from softsphere.functional.base_measure import check_mask_of_all_rows, refuse_empty
from softsphere.functional.on_linear import Affine
from softsphere.heads.row_keys import keys_of_rows
from softsphere.heads.weight_reader import WeightReader

__all__ = ["DenseReader"]


class DenseReader(WeightReader):
    """A reader of W (D, d) and b (D), in float32 or wider whatever their dtype."""

    def __init__(
        self,
        layer: Affine,
        pi: Tensor | None,
        loss: losses.Loss,
        options: LinearSphericalOptions,
    ) -> None:
        W, b, _ = layer
        super().__init__(loss, W.shape[1], W.shape[0], pi, W.device)
        self.W, self.b, self.options = W, b, options
        self.dtype = wide_dtype(W.dtype)
        self._recorded: tuple[Tensor, Tensor | None] | None = None

    def masked(self, mask: Any, hidden: Tensor) -> DenseReader:
        mask = check_mask_of_all_rows(mask, self.num_classes, "hidden", hidden)
        refuse_empty(mask)
        reader = copy.copy(self)
        reader.mask = mask
        return reader

    def rows_of(self, hidden: Tensor) -> Tensor:
        H = hidden.reshape(-1, self.in_features).to(self.dtype)
        return H if self.b is None else nn.functional.pad(H, (0, 1), value=1.0)

    def _read_from(self) -> tuple[Tensor, Tensor | None]:
        """W and b, as `weight.recorded_in` has them. A training step makes no copy of them."""
        if self._recorded is None:
            self._recorded = recorded_in(self.W, self.b, self.dtype)
        return self._recorded

    def weight_rows(self, classes: Tensor | slice) -> Tensor:
        W, b = self._read_from()
        rows = self._read(W, classes)
        rows = rows if b is None else torch.cat([rows, self._read(b, classes).unsqueeze(-1)], -1)
        if self.mask is None:
            return rows
        # masked entries of weight and bias may hold anything
        return rows.masked_fill(~self.mask[classes].unsqueeze(-1), 0.0)

    def _read(self, x: Tensor, classes: Tensor | slice) -> Tensor:
        if isinstance(classes, slice):
            return x[classes].to(self.dtype)
        return repeated_rows(x, classes, self.dtype)

    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        for part in chunks(self.num_classes, size):
            yield part, self.weight_rows(part)

    def row_keys(self, classes: Tensor | slice) -> Tensor:
        columns = [self.W] if self.b is None else [self.W, self.b.unsqueeze(1)]
        return keys_of_rows(*(x[classes].to(self.dtype) for x in columns))

    def outputs(self, H: Tensor, classes: Tensor | None = None) -> Tensor:
        if classes is not None:
            return H @ self.weight_rows(classes).mT
        W, b = self._read_from()
        W, b = W.to(self.dtype), None if b is None else b.to(self.dtype)
        if self.mask is not None:
            W = W.masked_fill(~self.mask.unsqueeze(1), 0.0)
            b = None if b is None else b.masked_fill(~self.mask, 0.0)
        # Narrowed, since the export of torch 2.6 compares the rows of a slice with its open end.
        return nn.functional.linear(H.narrow(1, 0, self.in_features), W, b)

    def is_differentiated(self, hidden: Tensor) -> bool:
        return is_recorded(hidden, self.W, self.b)

    def log_normaliser(self, H: Tensor) -> Tensor:
        """See `Reader.log_normaliser`.

        It is computed from (s, q) by the gram engine, which looks at its digits on a CPU, or by the
        chunked one for few rows. All the outputs are used for a comparator, for a derivative with
        engine="dense", inside torch.func transforms, in an exported program and with a mask.
        """
        if not self.loss.normalised:
            return H.new_zeros(H.shape[0])
        spherical = isinstance(self.loss, losses.Normalised) and self.mask is None
        by_engine = spherical and self.options.engine != "dense"
        recorded = self.is_differentiated(H) and not by_engine
        if recorded or exporting() or transformed():
            return self.every_score(H).logsumexp(1)
        if not isinstance(self.loss, losses.Normalised) or self.mask is not None:
            return self.log_normaliser_of_outputs(H)
        H = H[:, : self.in_features]
        statistics = guarded_statistics if len(H) > self.in_features else CHUNKED.statistics
        none = torch.empty(len(H), 0, dtype=torch.long, device=H.device)
        pi = None if self.pi is None else self.pi.to(H.dtype)
        x = Inputs(H, *self._read_from(), none, pi)
        s, q, _ = statistics(x, settings(x, self.options, centred=False))
        return self.loss.log_normaliser(s, q, float(self.num_classes))
