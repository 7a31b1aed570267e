"""The output layer for any optimizer.

The file is long for its docstrings and its signatures, which are those of `nn.CrossEntropyLoss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere._torch import eager, is_wrapper
from softsphere.engines.options import LinearSphericalOptions, options_or_default
from softsphere.engines.row_statistics import wide_dtype
from softsphere.functional.conventions import Conventions
from softsphere.functional.loading import Loading
from softsphere.functional.on_linear import Affine, loss_on_linear, without_logits
from softsphere.functional.on_shards import LossOnShards
from softsphere.functional.with_prior import WithPrior
from softsphere.heads.accumulating import AccumulatingLayer
from softsphere.heads.adoption import Tie, plain_parameters
from softsphere.heads.affine import made_dtype, start_as_linear, whole_layer
from softsphere.heads.dense_reader import DenseReader
from softsphere.heads.prediction import OutputLayer
from softsphere.heads.reader import Reader
from softsphere.heads.sharded import ShardedLayer, making
from softsphere.heads.sharded_reader import ReaderOfShard, ShardedWeightReader
from softsphere.parallel import Agreement, checksum, mesh_of_rows

__all__ = ["LinearSphericalLoss"]

_BUFFERS = ("class_weight", "prior")
# What the buffers of the classes of one rank are called. A prior of some classes alone is not
# normalised, as `prior` always is.
_OWN = {"own_class_weight": "class_weight", "own_prior": "prior"}


class LinearSphericalLoss(ShardedLayer, AccumulatingLayer, OutputLayer, WithPrior):
    r"""A linear output layer and its loss in one module, without the logits, for any optimizer.

    loss = head(hidden, target) is ℓ(W h + b, t), reduced over the rows. The parameters `weight` and
    `bias` are W and b, with the names, shapes and initial values of `nn.Linear`. Their gradients
    are dense tensors in `.grad`.

    Args:
        in_features: d.
        num_classes: D.
        loss: the name of a loss, or a loss. One that is not spherical computes the logits.
        bias: whether there is a b.
        prior: (D), positive class frequencies or counts, the base measure π. The buffer `prior`
            holds them in the dtype of the weight, in float32 for half precision.
        weight: (D), class weights, kept as the buffer `class_weight`.
        reduction, ignore_index: as in `nn.CrossEntropyLoss`.
        label_smoothing: as there. It needs the logits, which are then computed.
        options: which engine computes the loss, and how; see `LinearSphericalOptions`.
        device, dtype: of weight and bias. The dtype is float16, bfloat16, float32 or float64.
        process_group: a process group of torch.distributed or a DeviceMesh of one dimension, over
            whose ranks the classes are sharded, ⌈D/n⌉ for each. `weight` and `bias` are then the
            rows of this rank, ordinary parameters that any optimizer of single entries steps, such
            as Adam, while num_classes, prior, class weights and targets are those of all classes.
        replicated: with a process_group, whether all ranks give the same rows. By default each
            rank gives rows of its own.
        averaged: with a process_group, whether the layers below average their gradients over the
            ranks, as DistributedDataParallel and fully_shard do. Then the gradient with respect to
            hidden is n times as large, so that the average is right. None, the default, stands
            for True inside the forward of a DistributedDataParallel. Elsewhere it raises an error
            if hidden comes from layers below, since the layer cannot know.

    With a process_group every rank must make the layer, call it, call backward and step the
    optimizer, all in the same order. The loss is that of the rows of all ranks together, and every
    rank returns it; with reduction "none" it is that of each rank's own rows. The gradient with
    respect to hidden is that of the rank's own rows. A step sends O(m d) numbers, whatever D is.
    An invalid argument on one rank raises an error on every rank. The loss must be spherical, and
    there are no masks, no label smoothing and no class probabilities.

    `softsphere.parallel` has what a model around the layer needs: `leave_out_of_ddp` before
    DistributedDataParallel wraps it as a whole, `clip_grad_norm_`, and `keep_whole_state` for the
    state of its optimizer.

    Shapes: hidden (…, d); target (…), class indices of any integer dtype, or (…, K) with
    target_values (…, K), or class probabilities (…, D), for which the logits are computed. The
    sizes are those of `weight` whenever they are used, so that a weight may be resized.

    A step of the gram engine takes 4 D d² + 4 m d² FLOPs for m rows, where a step on logits takes
    6 m D d. `softsphere.engines.choose` tells which engine is taken.

    Raises ValueError or TypeError for invalid arguments. The message names the argument, the value
    received and a valid alternative.

    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; Krichene et al. 2018,
    arXiv:1807.07187 (the Gram identity).

    >>> head = LinearSphericalLoss(8, 1000)
    >>> optimizer = torch.optim.Adam(head.parameters())
    >>> head(torch.randn(4, 8), torch.tensor([1, 5, 5, 999])).backward()
    >>> optimizer.step()
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    class_weight: Tensor | None
    prior: Tensor | None
    own_prior: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: str | losses.Loss = "taylor_softmax",
        bias: bool = True,
        prior: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        options: LinearSphericalOptions | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
        replicated: bool = False,
        averaged: bool | None = None,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {"loss": loss, "prior": prior, "weight": weight, "bias": bias}
        given |= {"reduction": reduction, "ignore_index": ignore_index, "options": options}
        given |= {"label_smoothing": label_smoothing, "device": device, "dtype": dtype}
        with making(process_group, num_classes, replicated, averaged) as (shards, agreed):
            self.shards = shards
            self._make(in_features, num_classes, **given)
            if agreed is not None:
                agreed.same(layer=repr(self), dtype=self.weight.dtype)
                agreed.same(**{name: checksum(given[name]) for name in ("prior", "weight")})
        self._tie = Tie()
        self.reset_parameters()

    def _make(
        self,
        in_features: int,
        num_classes: int,
        *,
        loss: str | losses.Loss,
        bias: bool,
        prior: Tensor | None,
        weight: Tensor | None,
        options: LinearSphericalOptions | None,
        device: Any,
        dtype: torch.dtype | None,
        **rest: Any,
    ) -> None:
        """Checks the arguments of the constructor, and makes attributes, parameters and buffers."""
        in_features = checks.at_least_one("in_features", in_features)
        num_classes = checks.at_least_one("num_classes", num_classes)
        checks.flag("bias", bias)
        made_dtype(dtype)
        self.loss = losses.get(loss)
        self.options = options_or_default(options)
        own = slice(0, num_classes) if self.shards is None else self.shards.sharding.slice
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(own.stop - own.start, in_features, **made))
        pi = None if prior is None else checks.prior(prior, wide_dtype(self.weight.dtype))
        given = Conventions.checked(self.loss, weight=weight, pi=pi, **rest)
        self.reduction, self.ignore_index = given.reduction, given.ignore_index
        self.label_smoothing = given.label_smoothing
        if self.shards is not None:
            _shardable(self.loss, self.label_smoothing)
        vectors = (("class_weight", "weight", given.weight), ("prior", "prior", given.pi))
        for buffer, name, value in vectors:
            if value is not None:
                checks.class_vector(name, value, num_classes)
                # from_linear moves it from there to the device of the weight that it shares.
                value = value if self.weight.is_meta else value.to(self.weight.device)
            self.register_buffer(buffer, value if self.shards is None else None)
            if value is not None and self.shards is not None:
                self.register_buffer(f"own_{buffer}", value[own].clone())
        b = nn.Parameter(torch.empty(len(self.weight), **made)) if bias else None
        self.register_parameter("bias", b)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "options":
            value = options_or_default(value)
        if name in _BUFFERS and self.__dict__.get("shards") is not None:
            raise AttributeError(
                f"{name} of a layer with a process_group cannot be assigned, since each rank keeps "
                "the entries of its own classes; make the layer with it, or load a state_dict()"
            )
        super().__setattr__(name, value)

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """d, the second size of the weight as it is now."""
        return self.weight.shape[-1]

    @property
    def num_classes(self) -> int:
        """D, the first size of the weight as it is now, or of those of all ranks together."""
        return self.weight.shape[0] if self.shards is None else self.shards.sharding.num_classes

    @property
    def conventions(self) -> Conventions:
        """Those of all attributes, checked as they are now."""
        return Conventions.checked(
            self.loss,
            weight=self.vectors["class_weight"],
            pi=self.vectors["prior"],
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    @property
    def vectors(self) -> dict[str, Tensor | None]:
        """Class weights and prior of the classes of this rank, which are all without a group."""
        return {name: getattr(self, f"own_{name}", getattr(self, name)) for name in _BUFFERS}

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | nn.Embedding,
        loss: str | losses.Loss = "taylor_softmax",
        prior: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        options: LinearSphericalOptions | None = None,
        replicated: bool | None = None,
        averaged: bool | None = None,
    ) -> LinearSphericalLoss:
        """Returns an output layer that shares the parameters of another layer.

        The layer may be an `nn.Linear`, such as a language model's `lm_head`. It may also be an
        `nn.Embedding`, the rows of whose weight are then the classes (tied weights); a padding row
        is a class like any other.

        It must compute W h + b and nothing else. Hooks, adapters and parametrizations that it is
        given later have no effect on the loss.

        As long as that layer object exists, losses and predictions outside compiled graphs warn if
        the two no longer share their parameters, as after ``load_state_dict(assign=True)``. If a
        model replaces the layer as a whole (``model.lm_head = nn.Linear(…)``), the old one is gone
        like a layer that was meant to be dropped: there is no warning, so make the output layer
        again. Copies by pickle, or by `copy.deepcopy` with the output layer first, do not warn
        either. Parameters that are shared stay shared in copies of the model.

        Args:
            linear: the layer.
            loss, prior, weight, reduction, ignore_index, label_smoothing, options: as in
                `LinearSphericalLoss`.
            replicated, averaged: for a weight that is a DTensor with the placement Shard(0), as
                tensor parallelism makes it. The layer then has the process group of its mesh. Say
                replicated=True if all ranks have the same rows.

        Raises TypeError or ValueError, with what can be done instead, for a layer that is neither
        an nn.Linear nor an nn.Embedding, for one that overrides what these compute (LoRA,
        quantisation), computes its weight, or has hooks or a parametrization, for a sparse weight,
        and for an nn.Embedding with max_norm.

        >>> embedding = nn.Embedding(1000, 8)
        >>> LinearSphericalLoss.from_linear(embedding).weight is embedding.weight
        True
        """
        W, b = plain_parameters(linear)
        mesh = mesh_of_rows("the weight of linear", W)
        if b is not None and mesh_of_rows("the bias of linear", b) != mesh:
            raise ValueError("weight and bias of linear must be sharded over the same mesh")
        if mesh is None and replicated is None:
            replicated = False
        rest: dict[str, Any] = {"label_smoothing": label_smoothing, "options": options}
        rest |= {"weight": weight, "reduction": reduction, "ignore_index": ignore_index}
        rest |= {"device": "meta", "dtype": W.dtype}
        rest |= {"process_group": mesh, "replicated": replicated, "averaged": averaged}
        head = cls(W.shape[1], W.shape[0], loss, b is not None, prior, **rest)
        head.of_dtensors = mesh is not None
        head.weight, head.bias, head._tie = W, b, Tie(linear)
        for name, value in list(head.named_buffers(recurse=False)):
            setattr(head, name, value.to(W.device))
        return head

    def reset_parameters(self) -> None:
        """Draws the initial values of `nn.Linear`, uniform within ±1/√d.

        With a process_group each rank draws others, even if all were given the same seed.
        """
        if self.shards is None:
            start_as_linear(self.weight, self.bias)
        else:
            with self.shards.own_numbers(self.weight.device):
                start_as_linear(self._rows_of("weight"), self._rows_of("bias"))

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        target_values: Tensor | None = None,
        mask: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Computes ℓ(W h + b, t) of each row, reduced.

        Args:
            hidden: (…, d), the rows h, in the dtype of the weight, or any under autocast.
            target: (…), class indices; (…, K) with target_values; or class probabilities (…, D).
            target_values: (…, K), values of K-sparse targets, as in `functional.spherical_loss`.
            mask: (D), boolean, True for classes that take part.
            num_items: with a process_group, what the mean divides by: the same number on all
                ranks. None stands for the number of rows of all ranks that are not ignored.

        Returns a number, or (…) with reduction "none", in the dtype of the rows, or float32 under
        autocast. Raises what `functional.linear_spherical_loss` raises.
        """
        if self.shards is not None:
            return self._loss_on_shards(hidden, target, target_values, mask, num_items)
        checks.only_with_a_group("num_items", num_items)
        layer = self._layer()
        kept = self.accumulation
        if kept is not None:
            kept.check_use(**self._accumulated(layer))
        return loss_on_linear(
            hidden,
            layer,
            target,
            self.loss if self.training else self.loss.plain,
            self.conventions.masked(mask),
            target_values=target_values,
            options=self.options,
            statistics=None if kept is None else kept.statistics_of_batch,
        )

    @eager("a layer with a process_group compares its arguments with those of other ranks")
    def _loss_on_shards(
        self, hidden: Tensor, target: Tensor, values: Any, mask: Any, num_items: Any
    ) -> Tensor:
        """`forward` with a process group."""
        shards, kept = self.shards, self.accumulation
        assert shards is not None
        with Agreement(shards.ranks, "a loss") as agreed:
            shards.check_below(self, hidden, target)
            layer = self._layer()
            if kept is not None:
                kept.check_use(**self._accumulated(layer))
            job = LossOnShards(
                hidden,
                layer,
                target,
                _shardable(self.loss if self.training else self.loss.plain, self.label_smoothing),
                _unmasked(self.conventions, mask),
                shards,
                self.options,
                target_values=values,
                num_items=num_items,
                kept=kept,
            )
            job.agree(agreed)
        return job.value(agreed)

    def _layer(self) -> Affine:
        """Weight and bias, read once, since a parametrization may compute others the next time.

        Raises TypeError or ValueError if weight, bias, prior or class weights are of a wrong kind
        or do not fit together, as after one was replaced. Warns where a tie is lost.
        """
        if not torch.compiler.is_compiling():
            self._tie.check(self)
        return whole_layer(self._rows_of("weight"), self._rows_of("bias"), self.vectors)

    def _of_all(self, name: str) -> str | None:
        return _OWN.get(name, super()._of_all(name))

    def _whole(self, key: str, x: Tensor) -> Tensor:
        whole = key.endswith("prior") and not is_wrapper(x)
        return checks.loaded_prior(x) if whole else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearSphericalLoss:
        before: Tensor | None = getattr(self, "own_prior", None)
        was_meta, buffers = self.weight.is_meta, dict(self._buffers)
        super()._apply(fn, recurse)
        if was_meta and not self.weight.is_meta:
            # `to_empty` leaves no values in the buffers either, which had some.
            for name, x in buffers.items():
                if x is not None and not x.is_meta:
                    self._buffers[name] = x.to(self.weight.device)
        if self.shards is None or before is None:
            return self
        if self.own_prior.dtype in (torch.float16, torch.bfloat16):
            self.own_prior = before.to(self.own_prior.device)
        elif self.own_prior.dtype == torch.float64 != before.dtype and not before.is_meta:
            # normalised again, since the sum was rounded to float32
            mass = self.shards.ranks.sum(self.own_prior.sum())
            self.own_prior *= self.num_classes / mass
        return self

    def _reader(self) -> Reader:
        layer = self._layer()
        W, b, _ = layer
        checks.same_dtype(W, W, b, ("weight", "weight", "bias"))
        given = layer, self.vectors["prior"], self.loss, self.options
        if self.prior is not None:
            checks.normalised_prior(self.prior)
        if self.shards is not None:
            return ShardedWeightReader(ReaderOfShard(*given), self.shards)
        return DenseReader(*given)

    @property
    def base_measure(self) -> Tensor | None:
        """π (D), with a process_group that of the classes of this rank; None for π = 1."""
        return self.vectors["prior"]

    def _load_entries(self, state_dict: dict[str, Any], prefix: str, loading: Loading) -> None:
        super()._load_entries(state_dict, prefix, loading)
        # The state of an nn.Linear has neither buffer, and leaves them as they are.
        for name in (*_BUFFERS, *_OWN):
            if prefix + name in loading.missing_keys:
                loading.missing_keys.remove(prefix + name)

    def extra_repr(self) -> str:
        given = [name for name, value in self.vectors.items() if value is not None]
        sizes = f"{self.in_features}, {self.num_classes}"
        return (
            f"{sizes}, loss={self.loss}, "
            f"bias={self.bias is not None}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"engine={self.options.engine!r}" + "".join(f", {name}=…" for name in given)
        )


def _shardable(loss: losses.Loss, label_smoothing: float) -> losses.Spherical:
    """Returns the loss. Raises TypeError or ValueError for one that needs the logits."""
    refusal = without_logits(loss, label_smoothing, soft=False)
    if refusal is not None:
        raise type(refusal)(
            f"a layer with a process_group never makes the logits: {refusal}, in a layer without "
            "a process_group"
        )
    assert isinstance(loss, losses.Spherical)
    return loss


def _unmasked(conventions: Conventions, mask: Any) -> Conventions:
    """Returns the conventions. Raises TypeError if there is a mask."""
    if mask is not None:
        raise TypeError(
            "mask cannot be used with a process_group, whose ranks each know some of the classes; "
            "use a LinearSphericalLoss without one"
        )
    return conventions
