"""The factored output layer: SGD at a cost that does not grow with the number of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere._torch import eager, transforms_active
from softsphere.engines.factored_statistics import TWICE, factored_statistics
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_logits import spherical_value
from softsphere.heads.factored_reader import EXPORT, FactoredReader
from softsphere.heads.factored_state import LayerState, saved
from softsphere.heads.prediction import OutputLayer
from softsphere.losses import Spherical
from softsphere.matrix import FactoredTensor, Health, StructuredGradient
from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.upkeep import uninterrupted

__all__ = ["FactoredSphericalLoss"]


class FactoredSphericalLoss(OutputLayer):
    r"""Linear output layer and spherical loss in one, trained exactly in O(d²) a row.

    loss = head(hidden, target) is ℓ(W h + b, t) for every spherical loss. `weight` is one parameter
    (D, d + 1): the weight W and, as its last column, the bias b, whose input is always 1; without a
    bias it is (D, d). It is a `FactoredTensor`, and `loss.backward()` leaves a `StructuredGradient`
    in `weight.grad`; neither a loss nor a step touches more of W than the rows of the targets.

    `torch.optim.SGD` without momentum steps it, and `softsphere.optim.FactoredSGD` with and
    without; schedulers, `clip_grad_norm_`, gradient scaling, accumulation, hooks and weight
    averaging work on it as on any parameter. What acts on single numbers of W, as Adam does, raises
    TypeError before anything has changed. Weight and bias share a learning rate and weight decay.

    With a prior the parameter is diag(√π) [W b], since that is what SGD steps.
    `dense()`, `to_linear()` and `state_dict()` give W and b themselves.

    Args:
        in_features: d.
        num_classes: D.
        loss: a name or a spherical loss.
        bias: whether there is a b.
        prior: (D) positive class frequencies or counts, the base measure π.
        reduction, ignore_index: as in `nn.CrossEntropyLoss`.
        device, dtype: of the weight; float32 or float64.

    Shapes: hidden (…, d); target (…) class indices, or (…, K) with target_values (…, K).
    A step costs ≈ 7 m d² + 5 m² d multiply-adds for m < d rows, whatever D is; 2 m d² more once U
    has begun anew (`health().renewed`), and about four times that with momentum. Good learning
    rates grow with D: begin at 0.001·D to 0.1·D with the mean reduction.

    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; 2016, arXiv:1606.08061.

    >>> head = FactoredSphericalLoss(8, 1000)
    >>> optimizer = torch.optim.SGD(head.parameters(), lr=10.0)
    >>> loss = head(torch.randn(4, 8), torch.tensor([1, 5, 5, 999]))
    >>> loss.backward()
    >>> optimizer.step()
    """

    loss: Spherical
    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: str | losses.Loss = "taylor_softmax",
        bias: bool = True,
        prior: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checks.at_least_one("in_features", in_features)
        self.num_classes = checks.at_least_one("num_classes", num_classes)
        self.has_bias = checks.flag("bias", bias)
        _check_dtype(dtype)
        self.loss = _spherical(losses.get(loss))
        given = Conventions.checked(self.loss, reduction=reduction, ignore_index=ignore_index)
        self.reduction, self.ignore_index = given.reduction, given.ignore_index
        weight = torch.empty(num_classes, in_features, device=device, dtype=dtype)
        pi = None
        if prior is not None:
            pi = checks.prior(prior, weight.dtype)
            checks.class_vector("prior", pi, num_classes)
            pi = pi if weight.is_meta else pi.to(weight.device)
        columns = weight.new_empty(num_classes) if bias else None
        self.weight = nn.Parameter(FactoredTensor(weight, columns, pi))
        self.reset_parameters()

    @property
    def conventions(self) -> Conventions:
        """The attributes, checked as they are now. The weight holds the prior."""
        return Conventions.checked(
            self.loss, reduction=self.reduction, ignore_index=self.ignore_index
        )

    def register_parameter(self, name: str, param: Any) -> None:
        """See `nn.Module.register_parameter`.

        Raises TypeError for a second name of the weight, which pruning would register.
        """
        if isinstance(param, FactoredTensor) and name != "weight":
            raise TypeError(
                f"a factored weight cannot be kept as {name!r}: masks and pruning are for a dense "
                "weight, as LinearSphericalLoss has"
            )
        super().register_parameter(name, param)

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
        with torch.no_grad(), uninterrupted():
            for block in self._writable():
                block.uniform_(-bound, bound)
            self.matrix.reset_()

    @property
    def factored_weight(self) -> FactoredTensor:
        """The parameter `weight`.

        Raises: TypeError or ValueError if it was replaced by one that this layer cannot use.
        """
        weight: Tensor = self.weight
        if not isinstance(weight, FactoredTensor):
            raise TypeError(
                "the weight of a FactoredSphericalLoss must be a softsphere.matrix.FactoredTensor, "
                f"got {type(weight).__name__}; load other values by load_state_dict, or use "
                "LinearSphericalLoss, whose weight may be any tensor"
            )
        wanted = (self.num_classes, self.in_features + self.has_bias)
        if tuple(weight.shape) != wanted:
            raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
        return weight

    @property
    def matrix(self) -> FactoredMatrix:
        """The matrix that holds [W b] in factors."""
        return self.factored_weight.matrix

    @eager(
        "a factored layer keeps its weight in factors; compile the model around it, or use "
        'LinearSphericalLoss with options=LinearSphericalOptions(engine="dense")'
    )
    def forward(
        self, hidden: Tensor, target: Tensor, target_values: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden (…, d) against target.

        Raises: ValueError or TypeError that names the argument; RuntimeError inside torch.func
        transforms.
        """
        if transforms_active():
            raise RuntimeError(TWICE)
        checks.hidden(hidden, self.in_features)
        weight = self.factored_weight
        if not weight.is_leaf:
            raise TypeError(
                "the weight of a FactoredSphericalLoss must be a parameter of its own, but it is "
                "computed from another one (a parametrization); remove that, or use "
                "LinearSphericalLoss"
            )
        leading = hidden.shape[:-1]
        device = hidden.device.type
        with torch.autocast(device, enabled=False):
            H = self._reader().rows_of(hidden)
            dtype = H.dtype
            if target_values is None:
                checks.rows_target(leading, target)
                target, values = target.reshape(-1), None
            else:
                checks.sparse_rows(leading, target, target_values)
                target = target.reshape(-1, target.shape[-1])
                values = target_values.reshape(target.shape)
            conventions = self.conventions
            entries = conventions.entries(target, values, self.num_classes, dtype)
            x = factored_statistics(H, weight, entries.t, centred=self.loss.shift_invariant)
            rows = entries.weigh(spherical_value(self.loss, x, entries, conventions))
            return conventions.reduce(rows.view(leading), entries.counted)

    @property
    def base_measure(self) -> Tensor | None:
        return self.matrix.arrays.pi

    def _reader(self) -> FactoredReader:
        return FactoredReader(self.factored_weight, self.in_features, self.loss)

    log_prob = eager(EXPORT)(OutputLayer.log_prob)
    topk = eager(EXPORT)(OutputLayer.topk)
    predict = eager(EXPORT)(OutputLayer.predict)
    rank = eager(EXPORT)(OutputLayer.rank)

    @property
    def bias(self) -> Tensor | None:
        """b (D), or None: a copy of the last column of `weight`, which is √π b with a prior.

        It cannot be written by itself.
        """
        return self.weight[:, -1] if self.has_bias else None

    def dense(self) -> Tensor:
        """Returns [W b] (D, w) as a new tensor."""
        reader = self._reader()
        return reader.arrays().to_dense(columns=reader.columns)

    def to_linear(self) -> nn.Linear:
        """Returns an `nn.Linear` with the same weight and bias."""
        options = {"device": self.weight.device, "dtype": self.weight.dtype}
        linear: nn.Linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.num_classes, bias=self.has_bias, **options
        )
        reader = self._reader()
        with torch.no_grad():
            for part, rows in reader.arrays().chunks(columns=reader.columns):
                linear.weight[part] = rows[:, : self.in_features]
                if self.has_bias:
                    linear.bias[part] = rows[:, -1]
        return linear

    def health(self, probes: int = 4) -> Health:
        """Returns the numerical state of the factors; see `softsphere.matrix.Health`."""
        return self.matrix.health(probes)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, value in saved(self.matrix, self.has_bias).items():
            destination[prefix + name] = value

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
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.num_classes, self.in_features)}
        if self.has_bias:
            shapes["bias"] = (self.num_classes,)
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        adopt = bool(local_metadata.get("assign_to_params_buffers", False)) and "weight" in own
        dtype = own["weight"].dtype if adopt else self.weight.dtype
        state = LayerState(own, shapes, self.matrix.arrays.pi, dtype)
        missing, errors = state.missing(), state.errors(prefix)
        missing_keys += [prefix + name for name in missing]
        unexpected_keys += [prefix + name for name in state.unexpected()]
        error_msgs += errors
        if missing or errors:
            return
        with torch.no_grad():
            (self._adopt if adopt else self._assign)(state.columns(), state.prior())

    def _adopt(self, columns: list[Tensor], pi: Tensor | None) -> None:
        """Makes a new parameter that takes the given tensors as they are."""
        weight, *bias = columns
        bias = [x.to(weight.device, weight.dtype) for x in bias]
        pi = None if pi is None else pi.to(weight.device, weight.dtype)
        made = FactoredTensor(weight, bias[0] if bias else None, pi)
        for j in range(len(columns)):
            made.matrix.arrays.V.lend(j)
        self.weight = nn.Parameter(made, self.weight.requires_grad)

    def _assign(self, columns: list[Tensor], pi: Tensor | None) -> None:
        """Writes weight (D, d) and bias (D) into the parameter. Momentum beside it stays."""
        W = self.matrix.arrays
        with uninterrupted():
            for block, values in zip(self._writable(), columns, strict=True):
                block.copy_(values.view(block.shape))
            W.pi = None if pi is None else pi.to(W.device, W.dtype)
            self.matrix.reset_()

    def _writable(self) -> list[Tensor]:
        """The memory of weight and bias, to be overwritten, followed by `FactoredMatrix.reset_`."""
        W = self.matrix.arrays
        if W.blocks > 1:
            self.matrix.canonical_()
        W.V.own()
        return W.V.blocks[: 1 + self.has_bias]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredSphericalLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        grad = self.weight.grad
        # The gradient belongs to the converted weight. It would keep the old one alive otherwise.
        if isinstance(grad, StructuredGradient) and grad.content.edition in (
            None,
            self.matrix.edition,
        ):
            grad.content.block = self.factored_weight.block
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.num_classes}, loss={self.loss}, bias={self.has_bias}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"
        )


def _check_dtype(dtype: Any) -> None:
    """Raises TypeError for a dtype in which there are no factored weights."""
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"dtype must be torch.float32 or torch.float64, got {dtype!r}; a factored weight is "
            "float32 or float64, and for half precision around it there is torch.autocast"
        )


def _spherical(loss: losses.Loss) -> Spherical:
    """Returns the loss if it depends on the outputs through (s, q, c) alone."""
    if not isinstance(loss, Spherical):
        raise TypeError(
            f"loss must be spherical for a layer without logits, got {loss}; "
            "use nn.Linear with SphericalLoss for this one"
        )
    return loss
