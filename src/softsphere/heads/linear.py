"""The output layer for any optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere.engines.options import LinearSphericalOptions, options_or_default
from softsphere.engines.row_statistics import accumulator
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_linear import Affine, loss_on_linear
from softsphere.functional.with_prior import WithPrior
from softsphere.heads.accumulating import AccumulatingLayer
from softsphere.heads.adoption import Tie, plain_parameters
from softsphere.heads.affine import made_dtype, start_as_linear, whole_layer
from softsphere.heads.dense_reader import DenseReader
from softsphere.heads.prediction import OutputLayer

__all__ = ["LinearSphericalLoss"]

_BUFFERS = ("class_weight", "prior")


class LinearSphericalLoss(AccumulatingLayer, OutputLayer, WithPrior):
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
    ) -> None:
        super().__init__()
        in_features = checks.at_least_one("in_features", in_features)
        num_classes = checks.at_least_one("num_classes", num_classes)
        checks.flag("bias", bias)
        made_dtype(dtype)
        self.loss = losses.get(loss)
        self.options = options_or_default(options)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, **made))
        given = Conventions.checked(
            self.loss,
            weight=weight,
            pi=None if prior is None else checks.prior(prior, accumulator(self.weight.dtype)),
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        self.reduction, self.ignore_index = given.reduction, given.ignore_index
        self.label_smoothing = given.label_smoothing
        vectors = (("class_weight", "weight", given.weight), ("prior", "prior", given.pi))
        for buffer, name, value in vectors:
            if value is not None:
                checks.class_vector(name, value, num_classes)
                # from_linear moves it from there to the device of the weight that it shares.
                value = value if self.weight.is_meta else value.to(self.weight.device)
            self.register_buffer(buffer, value)
        b = nn.Parameter(torch.empty(num_classes, **made)) if bias else None
        self.register_parameter("bias", b)
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
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        options: LinearSphericalOptions | None = None,
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

        Raises TypeError or ValueError, with what can be done instead, for a layer that is neither
        an nn.Linear nor an nn.Embedding, for one that overrides what these compute (LoRA,
        quantisation), computes its weight, or has hooks or a parametrization, for a sparse weight,
        and for an nn.Embedding with max_norm.

        >>> embedding = nn.Embedding(1000, 8)
        >>> LinearSphericalLoss.from_linear(embedding).weight is embedding.weight
        True
        """
        W, b = plain_parameters(linear)
        rest: dict[str, Any] = {"label_smoothing": label_smoothing, "options": options}
        rest |= {"weight": weight, "reduction": reduction, "ignore_index": ignore_index}
        rest |= {"device": "meta", "dtype": W.dtype}
        head = cls(W.shape[1], W.shape[0], loss, b is not None, prior, **rest)
        head.weight, head.bias, head._tie = W, b, Tie(linear)
        for name in _BUFFERS:
            value = getattr(head, name)
            setattr(head, name, None if value is None else value.to(W.device))
        return head

    def reset_parameters(self) -> None:
        """Draws the initial values of `nn.Linear`, uniform within ±1/√d."""
        start_as_linear(self.weight, self.bias)

    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        target_values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of hidden (…, d) against target.

        See `functional.linear_spherical_loss` for the targets, the dtypes and what is raised.

        Args:
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
            self.loss if self.training else self.loss.plain,
            self.conventions.masked(mask),
            target_values=target_values,
            options=self.options,
            statistics=None if kept is None else kept.statistics_of_batch,
        )

    def _layer(self) -> Affine:
        """Weight and bias, read once, since a parametrization may compute others the next time.

        Raises TypeError or ValueError if weight, bias, prior or class weights are of a wrong kind
        or do not fit together, as after one was replaced. Warns where a tie is lost.
        """
        if not torch.compiler.is_compiling():
            self._tie.check(self)
        vectors = {name: getattr(self, name) for name in _BUFFERS}
        return whole_layer(self.weight, self.bias, vectors)

    def _reader(self) -> DenseReader:
        layer = self._layer()
        W, b, _ = layer
        checks.same_dtype(W, W, b, ("weight", "weight", "bias"))
        return DenseReader(layer, self.prior, self.loss, self.options)

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
        # The state of an nn.Linear has neither buffer, and leaves them as they are.
        for name in _BUFFERS:
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)

    def extra_repr(self) -> str:
        given = [name for name in _BUFFERS if getattr(self, name) is not None]
        sizes = ", ".join(map(str, reversed(self.weight.shape)))
        return (
            f"{sizes}, loss={self.loss}, "
            f"bias={self.bias is not None}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"engine={self.options.engine!r}" + "".join(f", {name}=…" for name in given)
        )
