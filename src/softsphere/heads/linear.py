"""The output layer for any optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from softsphere import checks, losses
from softsphere.criteria import WithPrior
from softsphere.engines import LinearSphericalOptions, options_or_default
from softsphere.engines.accumulation import Accumulation
from softsphere.engines.pending import refuse_step
from softsphere.engines.row_statistics import accumulator
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_linear import Affine, loss_on_linear, without_logits
from softsphere.heads.adoption import DTYPES, Tie, plain_parameters
from softsphere.heads.dense_reader import DenseReader
from softsphere.heads.prediction import OutputLayer

__all__ = ["LinearSphericalLoss"]

BUFFERS = ("class_weight", "prior")
# What errors call the rows, W and b.
NAMES = ("hidden", "weight", "bias")


class LinearSphericalLoss(OutputLayer, WithPrior):
    r"""Linear output layer and loss in one, without the logits, for any optimizer.

    loss = head(hidden, target) is ℓ(W h + b, t), W and b being the parameters `weight` and `bias`,
    named, shaped and initialised as those of `nn.Linear`. Their gradients are dense and in `.grad`.

    Args:
        in_features: d.
        num_classes: D.
        loss: a name or a loss; one that is not spherical makes the logits.
        bias: whether there is a b.
        prior: (D) positive class frequencies or counts, the base measure π.
        weight: (D) class weights, kept as `class_weight`.
        reduction, ignore_index: as in `nn.CrossEntropyLoss`.
        label_smoothing: as there; makes the logits.
        options: which engine, and how; see `LinearSphericalOptions`.
        device, dtype: of weight and bias.

    Shapes: hidden (…, d); target (…) class indices, (…, K) with target_values (…, K), or class
    probabilities (…, D), which make the logits.
    A step of the gram engine costs 4 D d² + 4 m d² FLOPs for m rows, where logits cost 6 m D d;
    `softsphere.engines.choose` says which is taken.

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
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        options: LinearSphericalOptions | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = checks.at_least_one("in_features", in_features)
        num_classes = checks.at_least_one("num_classes", num_classes)
        checks.flag("bias", bias)
        _check_dtype(dtype)
        self.loss = losses.get(loss)
        given = Conventions.checked(
            self.loss,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        self.reduction, self.ignore_index = given.reduction, given.ignore_index
        self.label_smoothing = given.label_smoothing
        self.options = options_or_default(options)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, **made))
        pi = None if prior is None else checks.prior(prior, accumulator(self.weight.dtype))
        for name, value in (("weight", weight), ("prior", pi)):
            if value is not None:
                checks.class_vector(name, value, num_classes)
        for name, value in zip(BUFFERS, (weight, pi), strict=True):
            # from_linear moves it to the device of the weight that it shares.
            at = value if value is None or self.weight.is_meta else value.to(self.weight.device)
            self.register_buffer(name, at)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_classes, **made)) if bias else None
        )
        self.accumulation: Accumulation | None = None
        self._tie = Tie()
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        """d, the second size of the weight as it is now."""
        return self.weight.shape[-1]

    @property
    def num_classes(self) -> int:
        """D, the first size of the weight as it is now."""
        return self.weight.shape[0]

    @property
    def conventions(self) -> Conventions:
        """The attributes, checked as they are now."""
        return Conventions.checked(
            self.loss,
            weight=self.class_weight,
            pi=self.prior,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | nn.Embedding,
        loss: str | losses.Loss = "taylor_softmax",
        prior: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        options: LinearSphericalOptions | None = None,
    ) -> LinearSphericalLoss:
        """Returns a layer that shares the parameters of `linear`, such as a language model's
        `lm_head`; or the weight of an `nn.Embedding`, whose rows are then the classes (tied
        weights), its padding row among them.

        The layer must compute W h + b and no more. Hooks, adapters and parametrizations that it is
        given later are not seen. As long as `linear` exists, a loss or prediction warns when the
        two no longer have the same parameters.

        Raises: TypeError or ValueError, with what can be done, for a layer that wraps or overrides
        nn.Linear (LoRA, quantisation), has hooks or a parametrization, or merely has a weight; and
        for an nn.Embedding with max_norm.

        >>> embedding = nn.Embedding(1000, 8)
        >>> LinearSphericalLoss.from_linear(embedding).weight is embedding.weight
        True
        """
        W, b = plain_parameters(linear)
        head = cls(
            W.shape[1],
            W.shape[0],
            loss,
            b is not None,
            prior,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            device="meta",
            dtype=W.dtype,
        )
        head.weight, head.bias = W, b
        head._tie = Tie(linear)
        for name in BUFFERS:
            value = getattr(head, name)
            setattr(head, name, None if value is None else value.to(W.device))
        return head

    def reset_parameters(self) -> None:
        """The initial values of `nn.Linear`: uniform within ±1/√d."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        target_values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden (…, d) against target; see `functional.linear_spherical_loss`.

        mask: (D), boolean, True for classes that take part.
        """
        layer = self._layer()
        kept = self.accumulation
        if kept is not None:
            kept.check_use(layer.weight, layer.bias, self.prior)
        return loss_on_linear(
            hidden,
            layer,
            target,
            self.loss,
            self.conventions.masked(mask),
            target_values=target_values,
            options=self.options,
            statistics=None if kept is None else kept.statistics_of_batch,
        )

    def _layer(self) -> Affine:
        """Weight and bias, read once, since a parametrization may compute others the next time.

        Raises ValueError if bias, prior or class weights do not fit the weight, as after one of
        them was replaced. Warns if the parameters are no longer those of the layer that was given
        to from_linear.
        """
        if not torch.compiler.is_compiling():
            self._tie.check(self)
        W, b = self.weight, self.bias
        if W.dim() != 2:
            raise ValueError(
                f"weight must have shape (num_classes, in_features), got {tuple(W.shape)}"
            )
        for name, x in (("bias", b), *((name, getattr(self, name)) for name in BUFFERS)):
            if x is not None and x.shape != W.shape[:1]:
                raise ValueError(
                    f"{name} must have shape ({len(W)},), one entry for each row of the weight "
                    f"{tuple(W.shape)}, got {tuple(x.shape)}; where the weight was replaced or "
                    f"resized, set head.{name} to one of that size, or make a new layer"
                )
        return Affine(W, b, NAMES)

    def _reader(self) -> DenseReader:
        layer = self._layer()
        return DenseReader(layer.weight, layer.bias, self.prior, self.loss, self.options)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gradient accumulation at the price of one batch: gram's work in D once for all of them.

        Inside, the Gram matrix of the weight is computed once, and a backward leaves its small
        share and keeps its rows of hidden; at the end autograd delivers the gradients that all of
        them come to, in one piece and by way of all hooks. Until then `weight.grad` and `bias.grad`
        are pending: zero_grad forgets them, and whatever else reads them raises. Step the optimizer
        after it. If an exception leaves it, nothing is added. Under autocast the weight is taken as
        it is, not rounded.

        DistributedDataParallel reduces the gradients of this layer at the end. Run forward and
        backward of every micro-batch but the last under its no_sync().

        Raises: RuntimeError where it is nested, where the weight is changed or its gradient read
        inside, where backward is called after it, asks for second derivatives or, with hooks or a
        process group, is for some tensors only; and under data-parallel wrappers that shard the
        weight, look for unused parameters or have it in another layer, too. ValueError or TypeError
        for what the gram engine cannot do.

        >>> head = LinearSphericalLoss(8, 1000)
        >>> with head.accumulate():
        ...     for _ in range(4):
        ...         (head(torch.randn(2, 8), torch.tensor([1, 5])) / 4).backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 8])
        """
        if self.accumulation is not None:
            raise RuntimeError("accumulate() cannot be nested; leave the one that is open first")
        for name, x, dim in (("weight", self.weight, 2), ("bias", self.bias, 1)):
            _check_accumulable(name, x, dim)
        W, b, _ = self._layer()
        if self.options.engine not in ("auto", "gram"):
            raise ValueError(
                f"accumulate() is of the gram engine, got engine={self.options.engine!r}; "
                "use engine='gram' or 'auto'"
            )
        refusal = without_logits(self.loss, self.label_smoothing, soft=False)
        if refusal:
            raise refusal
        self.accumulation = kept = Accumulation(
            W,
            b,
            self.prior,
            centred=self.loss.shift_invariant,
            options=self.options,
        )
        optimizers = register_optimizer_step_pre_hook(refuse_step)
        try:
            yield
            kept.finish()
        finally:
            optimizers.remove()
            kept.close()
            self.accumulation = None

    @property
    def base_measure(self) -> Tensor | None:
        return self.prior

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # The state of an nn.Linear has neither, and leaves them as they are.
        for name in BUFFERS:
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)

    def __getstate__(self) -> dict[str, Any]:
        # a copy is not in the middle of anything
        return {**self.__dict__, "accumulation": None}

    def extra_repr(self) -> str:
        given = [name for name in BUFFERS if getattr(self, name) is not None]
        sizes = ", ".join(map(str, reversed(self.weight.shape)))
        return (
            f"{sizes}, loss={self.loss}, "
            f"bias={self.bias is not None}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"engine={self.options.engine!r}" + "".join(f", {name}=…" for name in given)
        )


def _check_dtype(dtype: Any) -> None:
    """Raises TypeError for a dtype in which there are no such weights."""
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


def _check_accumulable(name: str, x: Any, dim: int) -> None:
    """Raises RuntimeError if accumulate() cannot compute with x or add to its gradient."""
    if x is None:
        return
    if not x.is_leaf:
        raise RuntimeError(
            f"accumulate() adds to {name}.grad, but the {name} is computed from something else "
            "(a parametrization); remove that, or accumulate without this context"
        )
    if is_traceable_wrapper_subclass(x) or x.dim() != dim:
        wanted = "(num_classes, in_features)" if dim == 2 else "(num_classes,)"
        raise RuntimeError(
            f"accumulate() needs the whole {name} as a plain tensor of shape {wanted}, got "
            f"{type(x).__name__} of shape {tuple(x.shape)}, as sharding wrappers make it "
            "(fully_shard); accumulate without this context"
        )
