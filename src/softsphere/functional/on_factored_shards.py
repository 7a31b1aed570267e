"""The losses of a factored output layer whose rows are sharded over ranks.

Every rank gathers the rows of all ranks and their targets, so that each has the gradient of the
whole batch and takes the same step. The rows of W at the targets come from the ranks that own them.
A step sends O(m d) numbers, whatever D is, and d² where the factors are mended.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from softsphere import losses
from softsphere.engines.factored_statistics import factored_statistics
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_logits import spherical_value
from softsphere.functional.rows_over_ranks import LossOverRanks, WeightsOfRank, entries_of_rank
from softsphere.matrix import FactoredTensor
from softsphere.matrix.sharded_arrays import ShardedArrays, small_bits
from softsphere.parallel import Agreement, Batch, own_part, same_on_all
from softsphere.stats import Stats

__all__ = ["FactoredLossOnShards"]


class FactoredLossOnShards(LossOverRanks):
    """See `LossOverRanks`.

    Args:
        H: (m, w), the hidden rows of this rank, with a column of ones for a bias.
        leading: the shape of the rows that were given, which H has flat.
        weight: the rows of [W b] of this rank.
        target, target_values: of this rank.

    Raises ValueError or TypeError for arguments that are wrong.
    """

    loss: losses.Spherical

    def __init__(
        self,
        H: Tensor,
        leading: torch.Size,
        weight: FactoredTensor,
        target: Any,
        loss: losses.Spherical,
        conventions: Conventions,
        *,
        target_values: Any = None,
        num_items: Any = None,
    ) -> None:
        W = weight.matrix.arrays
        assert isinstance(W, ShardedArrays)
        self.arrays, self.weight, D = W, weight, W.shards.sharding.num_classes
        hidden = H.view(*leading, H.shape[1])
        entries = entries_of_rank(hidden, target, target_values, conventions, D, H.dtype)
        super().__init__(H, hidden, entries, loss, conventions, W.shards, num_items)

    def weights(self) -> WeightsOfRank:
        # a step of the factors is the same on all ranks, whose small arrays are compared
        return WeightsOfRank((self.weight.matrix.edition,), (), [self.weight])

    def of_layer(self) -> dict[str, Any]:
        return {"small_arrays_of_the_weight": small_bits(self.arrays)}

    def agree(self, agreed: Agreement) -> None:
        super().agree(agreed)
        agreed.each(sums_known=int(self.arrays.sums_known))

    def losses_of_rank(self, batch: Batch, agreed: Agreement) -> tuple[Tensor, Tensor]:
        if not all(agreed.found["sums_known"]):
            # the rows of one rank were changed in place, as by a hand that wrote a few of them
            self.arrays.forget_gram()
        x, entries = self._statistics(batch), self.entries
        rows = entries.weigh(spherical_value(self.loss, x, entries, self.conventions))
        return rows, entries.counted

    def _statistics(self, batch: Batch) -> Stats:
        """The statistics of the rows of this rank."""
        every, target = same_on_all(self.H, batch), batch.gathered(self.entries.t)
        x = factored_statistics(every, self.weight, target, centred=self.loss.shift_invariant)
        columns = torch.cat([x.s.unsqueeze(1), x.q.unsqueeze(1), x.c], 1)
        s, q, c = own_part(columns, batch).split([1, 1, target.shape[1]], 1)
        pi = None if x.pi is None else x.pi[batch.own]
        own = replace(x, s=s.squeeze(1), q=q.squeeze(1), c=c)
        return replace(own, y=self.entries.y, pi=pi)
