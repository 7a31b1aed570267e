"""The factored output layer: SGD at a cost that does not grow with the number of classes.

The file is long for its docstrings, and for its loss with and without a process group.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere._torch import eager, transforms_active
from softsphere.engines.factored_statistics import TWICE, factored_statistics
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_factored_shards import FactoredLossOnShards
from softsphere.functional.on_logits import spherical_value
from softsphere.heads.constructor_argument import LINEAR_HAS_IT, ConstructorArgument
from softsphere.heads.factored_parameter import check_factored_dtype
from softsphere.heads.factored_reader import EXPORT, FactoredReader
from softsphere.heads.factored_state import FactoredState
from softsphere.heads.prediction import OutputLayer
from softsphere.heads.reader import Reader
from softsphere.heads.sharded import making
from softsphere.heads.sharded_reader import ReaderOfFactoredShard, ShardedWeightReader
from softsphere.losses import Spherical
from softsphere.matrix import FactoredTensor, Health
from softsphere.matrix.interrupts import undisturbed
from softsphere.matrix.turns import in_turn
from softsphere.parallel import Agreement, checksum

__all__ = ["FactoredSphericalLoss"]


class FactoredSphericalLoss(FactoredState, OutputLayer):
    r"""A linear output layer and its spherical loss, trained exactly in O(d²) per row.

    loss = head(hidden, target) is ℓ(W h + b, t), reduced over the rows. `weight` is one parameter
    (D, d + 1): the weight W and, as its last column, the bias b, whose input is always 1. Without a
    bias it is (D, d). It is a `FactoredTensor`, and `loss.backward()` leaves a `StructuredGradient`
    in `weight.grad`. Neither a loss nor a step touches more rows of W than those of the targets.

    `torch.optim.SGD` without momentum steps it, `softsphere.optim.FactoredSGD` also with momentum.
    Schedulers, `clip_grad_norm_`, gradient scaling, accumulation, hooks and weight averaging work
    on it as on any parameter. Optimizers of `torch.optim` that update entries of W individually,
    such as Adam, raise TypeError before anything has changed; those of other packages raise it when
    they reach the weight. Weight and bias share a learning rate and weight decay.

    With a prior the parameter is diag(√π) [W b], and that is what SGD steps. `dense()`,
    `to_linear()` and `state_dict()` give W and b themselves.

    Attributes:
        bias: (D) or None, a view of the last column of `weight`, which shows the current values:
            b, or √π b with a prior. What is written into it is written into the weight, in O(D w²).

    Args:
        in_features: d.
        num_classes: D, at least 2 for a loss that is a distribution.
        loss: the name of a spherical loss, or such a loss.
        bias: whether there is a b.
        prior: (D), positive class frequencies or counts, the base measure π, which the weight
            holds in its dtype.
        reduction, ignore_index: as in `nn.CrossEntropyLoss`.
        device, dtype: of the weight. The dtype is float32 or float64.
        process_group, replicated, averaged: as in `LinearSphericalLoss`. `weight` has the rows of
            this rank, and its gradient is that of the rows of all ranks: it must not be reduced,
            and its norm is that of the whole gradient on every rank.

    With a process_group a step sends O(m d) numbers for the m rows of all ranks. Every rank takes
    the same step of the small factors, from the same numbers by the same operations, so that they
    stay equal bit for bit; U, U⁻¹ and ω are compared at every call. All ranks must therefore run on
    machines that round alike, and call the same methods of the layer in the same order.

    Shapes: hidden (…, d); target (…), class indices of any integer dtype, or (…, K) with
    target_values (…, K).

    A step takes about 7 m d² + 4 m² d multiply-adds for m < d rows, whatever D is. It takes 2 m d²
    more after U has been replaced (`health().renewed`), and about four times as many with momentum.
    Good learning rates grow with D: begin at 0.001·D to 0.1·D with the mean reduction.

    Raises ValueError or TypeError for invalid arguments. The message names the argument, the value
    received and a valid alternative.

    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; 2016, arXiv:1606.08061.

    >>> head = FactoredSphericalLoss(8, 1000)
    >>> optimizer = torch.optim.SGD(head.parameters(), lr=10.0)
    >>> loss = head(torch.randn(4, 8), torch.tensor([1, 5, 5, 999]))
    >>> loss.backward()
    >>> optimizer.step()
    """

    loss: Spherical
    weight: nn.Parameter
    in_features: int = ConstructorArgument(kept=True)  # type: ignore[assignment]
    num_classes: int = ConstructorArgument(kept=True)  # type: ignore[assignment]
    prior = ConstructorArgument(read="base_measure")
    bias = ConstructorArgument(
        read="_last_column",
        instead="it is the last column of the weight; write into it, or load values by "
        "load_state_dict",
    )
    label_smoothing = ConstructorArgument(instead=LINEAR_HAS_IT)
    class_weight = ConstructorArgument(instead=LINEAR_HAS_IT)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: str | losses.Loss = "taylor_softmax",
        bias: bool = True,
        prior: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
        replicated: bool = False,
        averaged: bool | None = None,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {"loss": loss, "bias": bias, "prior": prior, "device": device}
        given |= {"reduction": reduction, "ignore_index": ignore_index, "dtype": dtype}
        with making(process_group, num_classes, replicated, averaged) as (shards, agreed):
            self.shards = shards
            self._make(in_features, num_classes, **given)
            if agreed is not None:
                agreed.same(layer=repr(self), dtype=self.weight.dtype, prior=checksum(prior))
        self.reset_parameters()

    def _make(
        self,
        in_features: int,
        num_classes: int,
        *,
        loss: str | losses.Loss,
        bias: bool,
        prior: Tensor | None,
        reduction: str,
        ignore_index: int | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        """Checks the arguments of the constructor, and makes attributes and the weight."""
        self.in_features = checks.at_least_one("in_features", in_features)
        self.num_classes = checks.at_least_one("num_classes", num_classes)
        self.has_bias = checks.flag("bias", bias)
        check_factored_dtype(torch.get_default_dtype() if dtype is None else dtype)
        self.loss = loss  # type: ignore[assignment]
        given = Conventions.checked(self.loss, reduction=reduction, ignore_index=ignore_index)
        self.reduction, self.ignore_index = given.reduction, given.ignore_index
        W = torch.empty(self._own_classes, self.in_features, device=device, dtype=dtype)
        pi = None
        if prior is not None:
            pi = checks.prior(prior, W.dtype)
            checks.class_vector("prior", pi, self.num_classes)
            pi = pi if self.shards is None else pi[self.shards.sharding.slice].clone()
            pi = pi if W.is_meta else pi.to(W.device)
        b = W.new_empty(self._own_classes) if bias else None
        self.weight = nn.Parameter(FactoredTensor(W, b, pi, self.shards))

    def _usable_loss(self, loss: Any) -> losses.Loss:
        """Raises TypeError for a loss that needs the logits, and ValueError for one that is 0."""
        found = _spherical(losses.get(loss, Spherical))
        if self.num_classes == 1 and found.normalised:
            raise ValueError(
                f"num_classes must be at least 2 for loss={found}, got 1: the only class has the "
                "probability 1, so that there is nothing to train"
            )
        return found

    def reset_parameters(self) -> None:
        """Draws the initial values of `nn.Linear`, uniform within ±1/√d.

        Raises RuntimeError if the layer was made on the meta device with a prior, which then has no
        values.
        """
        pi = self.matrix.arrays.pi
        if pi is not None and pi.is_meta and not self.matrix.arrays.V.blocks[0].is_meta:
            raise RuntimeError(
                "the prior was on the meta device and has no values; make the layer with a prior "
                "on a real device, or load it by load_state_dict"
            )
        bound = 1 / math.sqrt(self.in_features)
        own = nullcontext() if self.shards is None else self.shards.own_numbers(self.weight.device)
        with torch.no_grad(), undisturbed(), own:
            for block in self._writable():
                block.uniform_(-bound, bound)
            self._written()

    @eager(
        "a factored layer keeps its weight in factors; compile the model around it, or use "
        'LinearSphericalLoss with options=LinearSphericalOptions(engine="dense")'
    )
    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        target_values: Tensor | None = None,
        mask: None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of hidden (…, d) against target, in the dtype of the weight.

        Args:
            hidden: (…, d), floating-point.
            target: (…), class indices of any integer dtype, or (…, K) with target_values.
            target_values: (…, K), the values of K-sparse targets.
            mask: must be None. `LinearSphericalLoss` takes a mask of classes.
            num_items: with a process_group, what the mean divides by: the same number on all
                ranks. None stands for the number of rows of all ranks that are not ignored.

        Returns a scalar, or (…) for reduction "none". The mean of no rows at all is NaN.

        Raises ValueError or TypeError for invalid arguments, and RuntimeError inside torch.func
        transforms and in a backward that asks for second derivatives.
        """
        if self.shards is not None:
            return self._loss_on_shards(hidden, target, target_values, mask, num_items)
        checks.only_with_a_group("num_items", num_items)
        _refuse_mask(mask)
        reader = self._checked_reader(hidden)
        leading, values = hidden.shape[:-1], None
        if target_values is None:
            checks.rows_target(leading, target)
            target = target.reshape(-1)
        else:
            checks.sparse_rows(leading, target, target_values)
            target = target.reshape(-1, target.shape[-1])
            values = target_values.reshape(target.shape)
        for name, given in (("target", target), ("target_values", values)):
            checks.same_device(name, given, "hidden", hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            H, conventions = reader.rows_of(hidden), self.conventions
            entries = conventions.entries(target, values, self.num_classes, H.dtype)
            x = factored_statistics(H, reader.weight, entries.t, centred=self.loss.shift_invariant)
            rows = entries.weigh(spherical_value(self.loss, x, entries, conventions))
            return conventions.reduce(rows.view(leading), entries.counted)

    def _checked_reader(self, hidden: Tensor) -> FactoredReader:
        """The weight, after checks of it and of hidden (…, d)."""
        if transforms_active():
            raise RuntimeError(TWICE)
        reader = self._local_reader()
        reader.check(hidden)
        if not reader.weight.is_leaf:
            raise TypeError(
                "the weight of a FactoredSphericalLoss must be a parameter of its own, but it is "
                "computed from another one (a parametrization); remove that, or use "
                "LinearSphericalLoss"
            )
        return reader

    def _loss_on_shards(
        self, hidden: Tensor, target: Tensor, values: Any, mask: Any, num_items: Any
    ) -> Tensor:
        """`forward` with a process group."""
        assert self.shards is not None
        with Agreement(self.shards.ranks, "a loss") as agreed:
            self.shards.check_below(self, hidden, target)
            _refuse_mask(mask)
            reader = self._checked_reader(hidden)
            with torch.autocast(hidden.device.type, enabled=False):
                job = FactoredLossOnShards(
                    reader.rows_of(hidden),
                    hidden.shape[:-1],
                    reader.weight,
                    target,
                    self.loss,
                    self.conventions,
                    target_values=values,
                    num_items=num_items,
                )
            job.agree(agreed)
        with torch.autocast(hidden.device.type, enabled=False):
            return job.value(agreed)

    @property
    def base_measure(self) -> Tensor | None:
        """π (D), with a process_group that of the classes of this rank; None for π = 1."""
        return self.matrix.arrays.pi

    def _local_reader(self) -> FactoredReader:
        kind = FactoredReader if self.shards is None else ReaderOfFactoredShard
        return kind(self._factored_weight, self.in_features, self.loss)

    def _reader(self) -> Reader:
        reader = self._local_reader()
        if self.shards is not None and isinstance(reader, ReaderOfFactoredShard):
            return ShardedWeightReader(reader, self.shards)
        return reader

    # each in one turn, or its parts would be of several weights while another thread trains
    log_prob = eager(EXPORT)(in_turn(OutputLayer.log_prob))
    topk = eager(EXPORT)(in_turn(OutputLayer.topk))
    predict = eager(EXPORT)(in_turn(OutputLayer.predict))
    rank = eager(EXPORT)(in_turn(OutputLayer.rank))

    @property
    def _last_column(self) -> Tensor | None:
        return self.weight[:, -1] if self.has_bias else None

    def dense(self) -> Tensor:
        """Returns [W b] (D, w) as a new tensor; with a process_group, the rows of this rank."""
        reader = self._local_reader()
        return reader.arrays().to_dense(columns=reader.columns)

    def to_linear(self) -> nn.Linear:
        """Returns an `nn.Linear` with the same weight and bias.

        Raises RuntimeError with a process_group, whose ranks have some of the rows each.
        """
        if self.shards is not None:
            raise RuntimeError(
                "to_linear() needs all rows of the weight, of which this rank has some; save the "
                "state_dict() with torch.distributed.checkpoint and load it in one process"
            )
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear: nn.Linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.num_classes, bias=self.has_bias, **options
        )
        reader = self._local_reader()
        with torch.no_grad():
            for part, rows in reader.arrays().chunks(columns=reader.columns):
                linear.weight[part] = rows[:, : self.in_features]
                if self.has_bias:
                    linear.bias[part] = rows[:, -1]
        return linear

    def health(self, probes: int = 4) -> Health:
        """Returns the numerical state of the factors; see `softsphere.matrix.Health`."""
        return self.matrix.health(probes)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.num_classes}, loss={self.loss}, bias={self.has_bias}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"
        )


def _spherical(loss: losses.Loss) -> Spherical:
    """Returns the loss if it depends on the outputs through (s, q, c) alone."""
    if not isinstance(loss, Spherical):
        raise TypeError(
            f"loss must be spherical for a FactoredSphericalLoss, got {loss}; use one of "
            f"{', '.join(losses.names(Spherical))}, or LinearSphericalLoss, which takes every loss"
        )
    return loss


def _refuse_mask(mask: Any) -> None:
    """Raises TypeError for a mask of classes."""
    if mask is not None:
        raise TypeError(
            "mask cannot be used with a FactoredSphericalLoss, which keeps sums over all its "
            "classes; use LinearSphericalLoss, whose forward takes a mask of classes"
        )
