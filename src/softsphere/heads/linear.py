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
from softsphere.engines import LinearSphericalOptions, chunked, gram, options_or_default, stream
from softsphere.engines.accumulation import Accumulation
from softsphere.engines.pending import refuse_step
from softsphere.engines.row_statistics import accumulator
from softsphere.engines.weight import chunks
from softsphere.functional.conventions import Conventions
from softsphere.functional.on_linear import Affine, loss_on_linear, without_logits
from softsphere.heads.adoption import Tie, plain_parameters
from softsphere.heads.prediction import OutputLayer

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
        self.in_features, self.num_classes = in_features, num_classes
        given = Conventions.checked(
            self.loss,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        self.reduction, self.ignore_index = given.reduction, given.ignore_index
        self.label_smoothing = given.label_smoothing
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
        self.tie = Tie()
        self.reset_parameters()

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
        head.tie = Tie(linear)
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
        self.check_tie()
        kept = self.accumulation
        if kept is not None:
            kept.check_use(self.weight, self.bias, self.prior)
        return loss_on_linear(
            hidden,
            Affine(self.weight, self.bias),
            target,
            self.loss,
            self.conventions,
            target_values=target_values,
            options=self.options,
            statistics=None if kept is None else kept.statistics,
        )

    def check_tie(self) -> None:
        """Warns where the parameters are no longer those of the layer given to from_linear."""
        if not torch.compiler.is_compiling():
            self.tie.check(self)

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
        check_parameter("weight", self.weight, (self.num_classes, self.in_features))
        if self.bias is not None:
            check_parameter("bias", self.bias, (self.num_classes,))
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

    def rows_of(self, hidden: Tensor) -> Tensor:
        """hidden as (m, w) in float32 or wider, with the bias's column of ones."""
        dtype = accumulator(self.weight.dtype)
        H = hidden.reshape(-1, self.in_features).to(dtype)
        return H if self.bias is None else nn.functional.pad(H, (0, 1), value=1.0)

    def weight_rows(self, classes: Tensor | slice) -> Tensor:
        dtype = accumulator(self.weight.dtype)
        rows = self.weight[classes].to(dtype)
        if self.bias is None:
            return rows
        return torch.cat([rows, self.bias[classes].to(dtype).unsqueeze(-1)], -1)

    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        for part in chunks(self.num_classes, size):
            yield part, self.weight_rows(part)

    def outputs(self, H: Tensor, classes: Tensor | None = None) -> Tensor:
        if classes is not None:
            return H @ self.weight_rows(classes).mT
        W, b = self.weight.to(H.dtype), None if self.bias is None else self.bias.to(H.dtype)
        # narrowed, since the export of torch 2.6 compares the rows of a slice with its open end
        return nn.functional.linear(H.narrow(1, 0, self.in_features), W, b)

    def is_differentiated(self, hidden: Tensor) -> bool:
        return stream.differentiated(hidden, self.weight, self.bias)

    def log_normaliser(self, H: Tensor) -> Tensor:
        """log Σ_k π_k t(o_k) of each row: (m); 0 for a loss without it.

        From (s, q) by the gram engine, or the chunked one for few rows; from all the outputs where
        they do not do: for a comparator, by engine="dense" where it is differentiated, inside
        torch.func transforms and in an exported program.
        """
        if not self.loss.normalised:
            return H.new_zeros(H.shape[0])
        by_engine = isinstance(self.loss, losses.Normalised) and self.options.engine != "dense"
        recorded = self.is_differentiated(H) and not by_engine
        if recorded or stream.exporting() or stream.transformed():
            return self.classes().every_score(H).logsumexp(1)
        if not isinstance(self.loss, losses.Normalised):
            return stream.log_normaliser(self.classes(), H)
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


def check_parameter(name: str, x: Any, shape: tuple[int, ...]) -> None:
    """Raises: RuntimeError where accumulate() could not compute with x or add to its gradient."""
    if not x.is_leaf:
        raise RuntimeError(
            f"accumulate() adds to {name}.grad, but the {name} is computed from something else "
            "(a parametrization); remove that, or accumulate without this context"
        )
    if is_traceable_wrapper_subclass(x) or x.shape != shape:
        raise RuntimeError(
            f"accumulate() needs the whole {name} as a plain tensor of shape {shape}, got "
            f"{type(x).__name__} of shape {tuple(x.shape)}, as sharding wrappers make it "
            "(fully_shard); accumulate without this context"
        )
