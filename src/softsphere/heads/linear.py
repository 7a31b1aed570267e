"""The output layer for any optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere.engines import LinearSphericalOptions, chunked, gram, options_or_default, stream
from softsphere.engines.accumulation import Accumulation
from softsphere.engines.weight import chunks
from softsphere.functional.conventions import check_options
from softsphere.functional.linear import loss_on_linear, without_logits
from softsphere.heads.prediction import OutputLayer
from softsphere.modules import WithPrior

__all__ = ["LinearSphericalLoss"]

BUFFERS = ("class_weight", "prior")


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
        checks.at_least_one("in_features", in_features)
        checks.at_least_one("num_classes", num_classes)
        self.loss = losses.get(loss)
        check_options(self.loss, reduction, ignore_index, label_smoothing)
        self.in_features, self.num_classes = in_features, num_classes
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing = label_smoothing
        self.options = options_or_default(options)
        wide = torch.float64 if dtype == torch.float64 else None
        pi = None if prior is None else checks.prior(prior, wide)
        for name, value in (("weight", weight), ("prior", pi)):
            if value is not None:
                checks.class_vector(name, value, num_classes)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, **made))
        for name, value in zip(BUFFERS, (weight, pi), strict=True):
            # a weight that is yet to be borrowed is on no device
            at = value if value is None or self.weight.is_meta else value.to(self.weight.device)
            self.register_buffer(name, at)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_classes, **made)) if bias else None
        )
        self.accumulation: Accumulation | None = None
        self.reset_parameters()

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
        """The layer with the very parameters of `linear`, such as a language model's `lm_head`; or
        with the weight of an `nn.Embedding`, whose rows are then the classes (tied weights).

        >>> embedding = nn.Embedding(1000, 8)
        >>> LinearSphericalLoss.from_linear(embedding).weight is embedding.weight
        True
        """
        W, b = getattr(linear, "weight", None), getattr(linear, "bias", None)
        if not isinstance(W, nn.Parameter) or W.dim() != 2:
            raise TypeError(
                "linear must have a parameter `weight` of shape (num_classes, in_features), as "
                f"nn.Linear and nn.Embedding do, got {type(linear).__name__}"
            )
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
        )
        head.weight, head.bias = W, b
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
        self, hidden: Tensor, target: Tensor, target_values: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden (…, d) against target; see `functional.linear_spherical_loss`."""
        kept = self.accumulation
        if kept is not None and not kept.is_of(self.weight, self.bias, self.prior):
            raise RuntimeError(
                "the weight, bias or prior of the layer is another one than when accumulate() "
                "began; leave the context before they are replaced"
            )
        return loss_on_linear(
            hidden,
            self.weight,
            target,
            self.loss,
            b=self.bias,
            target_values=target_values,
            weight=self.class_weight,
            pi=self.prior,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            statistics=None if kept is None else kept.statistics,
        )

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gradient accumulation at the price of one batch: gram's work in D once for all of them.

        Inside, the Gram matrix of the weight is computed once, and a backward leaves its small
        share and keeps its rows of hidden; at the end the gradients that all of them come to are
        added to `weight.grad` and `bias.grad`. What is pending until then zero_grad does not
        forget and autograd.grad does not give. Step the optimizer after it. If an exception leaves
        it, nothing is added. Under autocast the weight is taken as it is, not rounded.

        Raises: RuntimeError where it is nested, where the weight is changed inside, where weight or
        bias has hooks on its gradient (data-parallel wrappers), which would see nothing of it, or
        backward is called after it; ValueError or TypeError for what the gram engine cannot do.

        >>> head = LinearSphericalLoss(8, 1000)
        >>> with head.accumulate():
        ...     for _ in range(4):
        ...         (head(torch.randn(2, 8), torch.tensor([1, 5])) / 4).backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 8])
        """
        if self.accumulation is not None:
            raise RuntimeError("accumulate() cannot be nested; leave the one that is open first")
        if not self.weight.is_leaf:
            raise RuntimeError(
                "accumulate() adds to weight.grad, but the weight is computed from something else "
                "(a parametrization); remove that, or accumulate without this context"
            )
        if any(hooked(x) for x in (self.weight, self.bias)):
            raise RuntimeError(
                "accumulate() adds to weight.grad and bias.grad itself, past the hooks that are on "
                "them (data-parallel wrappers set such); remove those, or do without the context"
            )
        if self.options.engine not in ("auto", "gram"):
            raise ValueError(
                f"accumulate() is of the gram engine, got engine={self.options.engine!r}; "
                "use engine='gram' or 'auto'"
            )
        refusal = without_logits(self.loss, self.label_smoothing, soft=False)
        if refusal:
            raise refusal
        self.accumulation = kept = Accumulation(
            self.weight,
            self.bias,
            self.prior,
            centred=self.loss.shift_invariant,
            options=self.options,
        )
        try:
            yield
            kept.finish()
        finally:
            kept.close()
            self.accumulation = None

    @property
    def base_measure(self) -> Tensor | None:
        return self.prior

    def rows_of(self, hidden: Tensor) -> Tensor:
        """hidden as (m, w) in float32 or wider, with the bias's column of ones."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        H = hidden.reshape(-1, self.in_features).to(dtype)
        return H if self.bias is None else nn.functional.pad(H, (0, 1), value=1.0)

    def weight_rows(self, classes: Tensor | slice) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        rows = self.weight.detach()[classes].to(dtype)
        if self.bias is None:
            return rows
        return torch.cat([rows, self.bias.detach()[classes].to(dtype).unsqueeze(-1)], -1)

    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        for part in chunks(self.num_classes, size):
            yield part, self.weight_rows(part)

    def log_normaliser(self, H: Tensor) -> Tensor:
        if not isinstance(self.loss, losses.Normalised):
            if self.loss.normalised:
                return stream.log_normaliser(self.classes(), H)
            return H.new_zeros(len(H))
        H = H[:, : self.in_features]
        engine = gram if len(H) > self.in_features else chunked
        none = torch.empty(len(H), 0, dtype=torch.long, device=H.device)
        pi = None if self.prior is None else self.prior.to(H.dtype)
        x = engine.statistics(
            H, self.weight, self.bias, none, pi, centred=False, options=self.options
        )
        return self.loss.log_normaliser(x.s, x.q, x.mass)

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
        # what a factored layer needs to go on
        unexpected_keys[:] = [
            key for key in unexpected_keys if not key.startswith(prefix + "factors.")
        ]
        # that of an nn.Linear has neither, and leaves them as they are
        for name in BUFFERS:
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)

    def __getstate__(self) -> dict[str, Any]:
        # a copy is not in the middle of anything
        return {**self.__dict__, "accumulation": None}

    def extra_repr(self) -> str:
        given = [name for name in BUFFERS if getattr(self, name) is not None]
        return (
            f"{self.in_features}, {self.num_classes}, loss={self.loss}, "
            f"bias={self.bias is not None}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, "
            f"engine={self.options.engine!r}" + "".join(f", {name}=…" for name in given)
        )


def hooked(x: Tensor | None) -> bool:
    """Whether something waits for the gradient of x."""
    return x is not None and bool(x._backward_hooks or x._post_accumulate_grad_hooks)
