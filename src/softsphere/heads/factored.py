"""The factored output layer: SGD at a cost that does not grow with the number of classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere.engines import factored
from softsphere.functional.conventions import REDUCTIONS, reduce
from softsphere.heads.prediction import OutputLayer
from softsphere.losses import Spherical
from softsphere.matrix import FactoredMatrix, Health, StructuredGradient
from softsphere.stats import Stats
from softsphere.targets import from_indices, from_sparse

__all__ = ["FactoredSphericalLoss"]

# What a state_dict has beside weight and bias, to go on exactly.
EXTRA = "factors."


class FactoredSphericalLoss(OutputLayer):
    r"""Linear output layer and spherical loss in one, trained exactly in O(d²) a row.

    loss = head(hidden, target) is ℓ(W h + b, t) for every spherical loss, and `loss.backward()`
    gives hidden its gradient. The gradient by W stays in `head.gradient` as a StructuredGradient
    until `softsphere.optim.FactoredSGD` takes its step; neither ever touches more of W than the
    rows of the targets. No optimizer that works elementwise on W (Adam) can do that.

    Args:
        in_features: d.
        num_classes: D.
        loss: a name or a spherical loss.
        bias: whether there is a b; it is one more column of W whose input is 1.
        prior: (D) positive class frequencies or counts, the base measure π. SGD then steps
            diag(√π) [W b].
        reduction, ignore_index: as in `nn.CrossEntropyLoss`.
        device, dtype: of the weight; float32 or float64.

    Shapes: hidden (…, d); target (…) class indices, or (…, K) with target_values (…, K).
    A step costs ≈ 7 m d² + 5 m² d multiply-adds for m < d rows, whatever D is; 2 m d² more once U
    has begun anew (`health().renewed`), and about four times that with momentum. Good learning
    rates grow with D: begin at 0.001·D to 0.1·D with the mean reduction.

    Source: Vincent, de Brébisson & Bouthillier 2015, arXiv:1412.7091; 2016, arXiv:1606.08061.

    >>> import softsphere
    >>> head = FactoredSphericalLoss(8, 1000)
    >>> optimizer = softsphere.optim.FactoredSGD([head], lr=10.0)
    >>> loss = head(torch.randn(4, 8), torch.tensor([1, 5, 5, 999]))
    >>> loss.backward()
    >>> optimizer.step()
    """

    loss: Spherical
    prior: Tensor | None

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
        checks.at_least_one("in_features", in_features)
        checks.at_least_one("num_classes", num_classes)
        checks.one_of("reduction", reduction, REDUCTIONS)
        self.loss = spherical(losses.get(loss))
        self.in_features, self.num_classes = in_features, num_classes
        self.has_bias = bias
        self.reduction, self.ignore_index = reduction, ignore_index
        weight = torch.empty(num_classes, in_features + bias, device=device, dtype=dtype)
        pi = None
        if prior is not None:
            pi = checks.prior(prior, weight.dtype)
            checks.class_vector("prior", pi, num_classes)
            pi = pi.to(weight.device)
        bound = 1 / math.sqrt(in_features)
        self.matrix = FactoredMatrix(weight.uniform_(-bound, bound), pi)
        # Stands for the weight where PyTorch wants a parameter; see `current_gradient`.
        self.anchor = nn.Parameter(weight.new_zeros(()))
        self.gradient: StructuredGradient | None = None
        self.tokens = 0  # how often a backward has added to it
        self.backward = -1  # the last backward that has been recorded
        self.edition = -1  # that of W, when the gradient was begun
        self.has_optimizer = False

    def reset_parameters(self) -> None:
        """The initial values of `nn.Linear`: uniform within ±1/√d."""
        bound = 1 / math.sqrt(self.in_features)
        self.matrix.narrow_()
        self.matrix.V.uniform_(-bound, bound)
        self.matrix.reset_()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, hidden: Tensor, target: Tensor, target_values: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden (…, d) against target.

        Raises: ValueError or TypeError that names the argument; RuntimeError where an optimizer
        other than FactoredSGD has been given this layer.
        """
        stepped = self.training and torch.is_grad_enabled() and self.anchor._version > 0
        if stepped and not self.has_optimizer:
            raise RuntimeError(
                "an optimizer has stepped the parameters of a FactoredSphericalLoss, but only "
                "softsphere.optim.FactoredSGD([head], lr=…) can train its weight; for Adam use "
                "LinearSphericalLoss or nn.Linear with SphericalLoss"
            )
        checks.hidden(hidden, self.in_features)
        leading = hidden.shape[:-1]
        device = hidden.device.type
        with torch.autocast(device, enabled=False):
            H = self.rows_of(hidden)
            dtype = H.dtype
            if target_values is None:
                checks.rows_target(leading, target)
                entries = from_indices(target.reshape(-1), self.num_classes, self.ignore_index)
            else:
                checks.sparse_rows(leading, target, target_values)
                K = target.shape[-1]
                entries = from_sparse(
                    target.reshape(-1, K),
                    target_values.reshape(-1, K).to(dtype),
                    self.num_classes,
                    self.ignore_index,
                )
            x = factored.statistics(
                H, self.anchor, entries.t, self, centred=self.loss.shift_invariant
            )
            rows = self.loss.value(Stats(x.s, x.q, x.c, x.mass, y=entries.y, pi=x.pi))
            rows = torch.where(entries.ignored, 0.0, rows)
            return reduce(rows.view(leading), (~entries.ignored).to(dtype), self.reduction)

    def rows_of(self, hidden: Tensor) -> Tensor:
        """hidden as (m, w) in the weight's dtype, with the bias's column of ones."""
        H = hidden.reshape(-1, self.in_features).to(self.matrix.V.dtype)
        return nn.functional.pad(H, (0, 1), value=1.0) if self.has_bias else H

    def record(self, gradient: StructuredGradient) -> None:
        """Adds a gradient, or begins anew where the anchor's has been zeroed since.

        During one backward the anchor has no gradient yet, however often the layer was used.
        """
        backward = torch._C._current_graph_task_id()
        zeroed = self.anchor.grad is None and backward != self.backward
        if self.gradient is None or zeroed:
            self.gradient, self.edition, self.tokens = gradient, self.matrix.edition, 1
        else:
            self.gradient, self.tokens = self.at_hand() + gradient, self.tokens + 1
        self.backward = backward

    def at_hand(self) -> StructuredGradient:
        """The gradient as it was recorded, if that was at the W that there is now."""
        assert self.gradient is not None
        if self.edition != self.matrix.edition:
            raise RuntimeError(
                "the gradient of a FactoredSphericalLoss belongs to the weight before the last "
                "step; call optimizer.zero_grad() after each step"
            )
        return self.gradient

    def current_gradient(self) -> StructuredGradient | None:
        """The gradient that there is to be stepped, or None.

        A backward leaves TOKEN in the anchor's gradient. Whoever has multiplied that since, as
        torch.amp.GradScaler or a clipping of all parameters does, has multiplied this, too.

        Raises: RuntimeError where W was stepped since it was taken: what multiplies W is another
        one now, so it can be neither added to nor stepped again.
        """
        if self.anchor.grad is None or self.gradient is None:
            return None
        scale = self.anchor.grad / (self.tokens * factored.TOKEN)
        if scale.device.type == "cpu" and float(scale) == 1:
            return self.at_hand()
        return self.at_hand() * scale.to(self.gradient.H)

    @property
    def base_measure(self) -> Tensor | None:
        return self.matrix.pi

    def weight_rows(self, classes: Tensor) -> Tensor:
        return self.matrix.rows(classes, slice(0, self.matrix.width))

    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        return self.matrix.chunks(size, slice(0, self.matrix.width))

    def log_normaliser(self, H: Tensor) -> Tensor:
        """log Σ_k π_k t(o_k) of each row from Q and w̄: (m); 0 for a loss without it."""
        if not isinstance(self.loss, losses.Normalised):
            return H.new_zeros(len(H))
        d = self.matrix.width
        q = ((H @ self.matrix.small("gram")[:d, :d]) * H).sum(-1).clamp_min(0)
        s = H @ self.matrix.small("colsum")[:d]
        return self.loss.log_normaliser(s, q, self.matrix.mass)

    @property
    def weight(self) -> Tensor:
        """W as a new tensor (D, d)."""
        return self.dense()[:, : self.in_features]

    @property
    def bias(self) -> Tensor | None:
        """b as a new tensor (D), or None."""
        if not self.has_bias:
            return None
        column = slice(self.in_features, self.in_features + 1)
        return torch.cat([rows.squeeze(1) for _, rows in self.matrix.chunks(columns=column)])

    def dense(self) -> Tensor:
        """[W b] as a new tensor."""
        return self.matrix.to_dense(columns=slice(0, self.matrix.width))

    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` with the same weight and bias."""
        options = {"device": self.matrix.V.device, "dtype": self.matrix.V.dtype}
        linear: nn.Linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.num_classes, bias=self.has_bias, **options
        )
        with torch.no_grad():
            for part, rows in self.matrix.chunks(columns=slice(0, self.matrix.width)):
                linear.weight[part] = rows[:, : self.in_features]
                if self.has_bias:
                    linear.bias[part] = rows[:, -1]
        return linear

    def health(self, probes: int = 4) -> Health:
        """How well the factors stand; see `softsphere.matrix.Health`."""
        return self.matrix.health(probes)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # V is written as W itself first, so that weight and bias are views of it and not copies.
        matrix = self.matrix
        matrix.canonical_()
        destination[prefix + "weight"] = matrix.V[:, : self.in_features]
        if self.has_bias:
            destination[prefix + "bias"] = matrix.V[:, self.in_features]
        if matrix.pi is not None:
            destination[prefix + "prior"] = matrix.pi
        for name, value in matrix.extra_state().items():
            destination[prefix + EXTRA + name] = value

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
        wanted = {"weight": (self.num_classes, self.in_features)}
        if self.has_bias:
            wanted["bias"] = (self.num_classes,)  # type: ignore[assignment]
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        extra = {k[len(EXTRA) :]: v for k, v in own.items() if k.startswith(EXTRA)}
        known = {*wanted, "prior", *(EXTRA + name for name in extra)}
        unexpected_keys += [prefix + key for key in own if key not in known]
        missing_keys += [prefix + key for key in wanted if key not in own]
        for key, shape in wanted.items():
            if key in own and tuple(own[key].shape) != shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{key}: copying a param with shape "
                    f"{tuple(own[key].shape)}, the shape in current model is {shape}."
                )
        if extra:
            missing_keys += [
                prefix + EXTRA + name for name in self.matrix.SMALL if name not in extra
            ]
            error_msgs += [f"{prefix}{EXTRA}{why}" for why in self.matrix.misfits(extra)]
        if "prior" in own:
            try:
                pi = checks.prior(own["prior"], self.matrix.V.dtype)
                checks.class_vector("prior", pi, self.num_classes)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}prior cannot be loaded: {error}")
        if error_msgs or any(key.startswith(prefix) for key in missing_keys):
            return
        with torch.no_grad():
            matrix = self.matrix
            matrix.narrow_()
            matrix.V[:, : self.in_features].copy_(own["weight"])
            if self.has_bias:
                matrix.V[:, self.in_features].copy_(own["bias"])
            if "prior" in own:
                # one that comes with its factors is what they were made with, to the last bit
                same = extra and own["prior"].dtype == matrix.V.dtype
                matrix.pi = (own["prior"] if same else pi).to(matrix.V)
            if extra:
                matrix.load_extra_state(extra)
            else:
                matrix.reset_()
        self.gradient = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredSphericalLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # half precision has no room for what the anchor's gradient says
        self.anchor.data = self.anchor.data.to(self.matrix.V.dtype)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.num_classes}, loss={self.loss}, bias={self.has_bias}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"
        )


def spherical(loss: losses.Loss) -> Spherical:
    """The loss, if it sees the outputs through (s, q, c) alone."""
    if not isinstance(loss, Spherical):
        raise TypeError(
            f"loss must be spherical for a layer without logits, got {loss}; "
            "use nn.Linear with SphericalLoss for this one"
        )
    return loss
