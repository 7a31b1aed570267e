"""SGD for factored output layers, step for step that of `torch.optim.SGD` on the dense weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from softsphere import checks
from softsphere.heads import FactoredSphericalLoss
from softsphere.matrix import StructuredGradient
from softsphere.matrix.update import Blocks

__all__ = ["FactoredSGD", "clip_grad_norm_"]


class FactoredSGD(torch.optim.Optimizer):
    """`torch.optim.SGD` on the weight [W b] of FactoredSphericalLoss, in O(m d² + m² d) a step.

    With a prior the matrix that is stepped is diag(√π) [W b]. Momentum is a second matrix of the
    size of W, kept factored beside it.

    Args:
        heads: the layers, or param groups {"heads": [...], "lr": ...}.
        lr, momentum, dampening, weight_decay, nesterov: as in `torch.optim.SGD`. Good rates grow
            with D.

    Raises: softsphere.matrix.SingularStepError, with nothing changed, where a step cannot be taken.

    >>> import softsphere
    >>> head = softsphere.FactoredSphericalLoss(4, 50)
    >>> FactoredSGD([head], lr=1.0, momentum=0.9).param_groups[0]["momentum"]
    0.9
    """

    def __init__(
        self,
        heads: Iterable[FactoredSphericalLoss] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        checks.non_negative("lr", float(lr))
        checks.non_negative("momentum", momentum)
        checks.non_negative("weight_decay", weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")
        self.heads: dict[Tensor, FactoredSphericalLoss] = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(list(heads), defaults)  # type: ignore[arg-type]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group {"heads": [...], "lr": ...}."""
        group = dict(param_group)
        heads = group.pop("heads", group.pop("params", None))
        heads = [heads] if isinstance(heads, torch.nn.Module) else list(heads or ())
        for head in heads:
            if not isinstance(head, FactoredSphericalLoss):
                raise TypeError(
                    f"heads must be FactoredSphericalLoss layers, got {type(head).__name__}; give "
                    "the other parameters to another optimizer"
                )
        super().add_param_group({**group, "params": [head.anchor for head in heads]})
        for head in heads:
            self.heads[head.anchor] = head
            head.has_optimizer = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "heads": self.heads}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, anchors' included."""
        super().zero_grad(set_to_none=True)
        for head in self.heads.values():
            head.gradient = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every layer that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for anchor in group["params"]:
                head = self.heads[anchor]
                gradient = head.current_gradient()
                if gradient is not None:
                    self.step_head(head, gradient, group, self.state[anchor])
        return loss

    def step_head(
        self,
        head: FactoredSphericalLoss,
        gradient: StructuredGradient,
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        """W ← W − lr·g, or with B ← momentum·B + (1 − dampening)·g what SGD makes of B."""
        lr, mu, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        if not mu:
            head.matrix.narrow_()
            head.matrix.add_(gradient, alpha=-lr, decay=lr * decay)
            return
        started = state.get("momentum", False)
        share = 1 - group["dampening"] if started else 1.0
        if group["nesterov"]:
            spread = (-lr * (1 + mu), 1.0)
            base = ((1 - lr * (1 + mu) * decay, decay), (-lr * mu * mu, mu))
        else:
            spread = (-lr * share, share)
            base = ((1 - lr * share * decay, share * decay), (-lr * mu, mu))
        blocks = Blocks(base, spread)
        if not started:
            head.matrix.narrow_()
        head.matrix.widen_(blocks)
        head.matrix.transform_(gradient, blocks)
        state["momentum"] = True


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor | FactoredSphericalLoss] | Tensor | FactoredSphericalLoss,
    max_norm: float,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` (2-norm) over parameters and factored layers together.

    Returns the norm before, as if the layers' dense gradients had been there (by diag(√π) [W b]).
    """
    if isinstance(parameters, (Tensor, FactoredSphericalLoss)):
        parameters = [parameters]
    items = list(parameters)
    heads = [item for item in items if isinstance(item, FactoredSphericalLoss)]
    grads = [p.grad for p in items if isinstance(p, Tensor) and p.grad is not None]
    norms = [torch.linalg.vector_norm(grad).double() for grad in grads]
    each = [(head, head.current_gradient()) for head in heads]
    norms += [head.matrix.norm(gradient) for head, gradient in each if gradient is not None]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(norms[0].device) for norm in norms])
    )
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the norm of the gradients is {float(total)}; it cannot be clipped")
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale.to(grad))
    for head, gradient in each:
        if gradient is not None:
            head.gradient = head.at_hand() * scale.to(gradient.H)
    return total.to(grads[0].dtype if grads else torch.get_default_dtype())
