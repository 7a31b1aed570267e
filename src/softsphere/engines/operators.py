"""Registers the forward and the backward of an engine with PyTorch as custom operators.

An engine that is an operator is opaque to `torch.compile` and `torch.export`: it may loop over
chunks whose number depends on sizes. It gives two functions, and the shapes of the tensors that the
first one keeps for the second one. Schema, shape inference and autograd are written here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from softsphere._torch import gradients_wanted
from softsphere.engines.engine import Gradients, Inputs, Settings

__all__ = ["Backward", "Forward", "LinearOperator"]

# s, q, c, and then the tensors that the backward needs.
Forward = Callable[[Inputs, Settings], tuple[Tensor, ...]]
# ∂H, ∂W and ∂b, each None unless it is needed.
Backward = Callable[
    [Gradients, Inputs, tuple[Tensor, ...], Settings, tuple[bool, bool, bool]],
    tuple[Tensor | None, Tensor | None, Tensor | None],
]

_INPUTS = "Tensor H, Tensor W, Tensor? b, Tensor target, Tensor? pi"
_SETTINGS = "bool centred, int? row_chunk, int? class_chunk, ScalarType dtype, bool deterministic"


@dataclass(frozen=True)
class LinearOperator:
    """The operators "softsphere::NAME" and "softsphere::NAME_backward" of an engine.

    forward: s, q, c, and then what `backward` needs besides the inputs
    backward: the gradients with respect to H, W and b
    keeps: the shape of each tensor that `forward` keeps, in the dtype of the settings, with one
        letter for each dimension: m rows, K targets, D classes, d columns of W, n of [W b]

    Calling it gives s, q and c, differentiable once with respect to H, W and b.
    """

    name: str
    forward: Forward
    backward: Backward
    keeps: tuple[str, ...]
    forward_operator: Any = field(init=False, repr=False)
    backward_operator: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        forward, backward = _forward_operator(self), _backward_operator(self)
        _connect(forward, backward)
        object.__setattr__(self, "forward_operator", forward)
        object.__setattr__(self, "backward_operator", backward)

    def __call__(self, x: Inputs, how: Settings) -> tuple[Tensor, Tensor, Tensor]:
        s, q, c, *_ = self.forward_operator(*x, *how)
        return s, q, c


def _forward_operator(of: LinearOperator) -> Any:
    def forward(*args: Any) -> tuple[Tensor, ...]:
        x, how = Inputs(*args[:5]), Settings(*args[5:])
        with torch.autocast(x.H.device.type, enabled=False):
            return of.forward(x, how)

    def shapes(*args: Any) -> tuple[Tensor, ...]:
        x, how = Inputs(*args[:5]), Settings(*args[5:])
        (m, d), K = x.H.shape, x.target.shape[1]
        sizes = {"m": m, "K": K, "D": x.W.shape[0], "d": d, "n": d if x.b is None else d + 1}
        letters = ("m", "m", "mK", *of.keeps)
        made = [[sizes[letter] for letter in shape] for shape in letters]
        return tuple(x.H.new_empty(shape, dtype=how.dtype) for shape in made)

    outputs = ", ".join(["Tensor"] * (3 + len(of.keeps)))
    operator = torch.library.custom_op(
        f"softsphere::{of.name}",
        forward,
        mutates_args=(),
        schema=f"({_INPUTS}, {_SETTINGS}) -> ({outputs})",
    )
    operator.register_fake(shapes)
    return operator


def _backward_operator(of: LinearOperator) -> Any:
    last = 3 + 5 + len(of.keeps)

    def empty(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        # An operator cannot return None, so that a gradient that is not needed has no entries.
        H, W, b, needs = *args[3:6], args[-1]
        return (
            H.new_empty(H.shape if needs[0] else 0),
            torch.empty_like(W) if needs[1] else W.new_empty(0),
            H.new_empty(0) if b is None else b.new_empty(b.shape if needs[2] else 0),
        )

    def backward(*args: Any) -> tuple[Tensor, ...]:
        g, x, kept = Gradients(*args[:3]), Inputs(*args[3:8]), args[8:last]
        how, needs = Settings(*args[last:-1]), tuple(args[-1])
        with torch.autocast(x.H.device.type, enabled=False):
            found = of.backward(g, x, kept, how, needs)
        return tuple(
            given.new_empty(0) if grad is None else grad
            for given, grad in zip((x.H, x.W, x.H if x.b is None else x.b), found, strict=True)
        )

    kept = "".join(f"Tensor kept{i}, " for i in range(len(of.keeps)))
    operator = torch.library.custom_op(
        f"softsphere::{of.name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor gs, Tensor gq, Tensor gc, {_INPUTS}, {kept}{_SETTINGS}, bool[] needs)"
        " -> (Tensor, Tensor, Tensor)",
    )
    operator.register_fake(lambda *args: empty(args))
    operator.register_autograd(_refuse)
    return operator


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "this engine has first derivatives alone; for second ones use "
        'options=LinearSphericalOptions(engine="dense")'
    )


def _connect(forward: Any, backward: Any) -> None:
    """Makes the backward operator the derivative of the forward one."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.how = Settings(*inputs[5:])
        ctx.save_for_backward(*inputs[:5], *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    def pull(ctx: Any, gs: Any, gq: Any, gc: Any, *_: None) -> tuple[Tensor | None, ...]:
        saved, how = ctx.saved_tensors, ctx.how
        # H and W come first; b has a node of its own only where it is given
        needs = gradients_wanted(ctx, 3 if saved[2] is not None else 2)
        needs = [*needs, False][:3]
        g = _upstream(gs, gq, gc, saved[3], how.dtype)
        found = backward(*g, *saved, *how, needs)
        grads = (x if need else None for x, need in zip(found, needs, strict=True))
        return *grads, *[None] * (2 + len(how))

    forward.register_autograd(pull, setup_context=save)


def _upstream(
    gs: Tensor | None, gq: Tensor | None, gc: Tensor | None, target: Tensor, dtype: torch.dtype
) -> Gradients:
    """The upstream gradients, with zeros where nothing depends on a statistic."""
    m, K = target.shape

    def zeros(*shape: int) -> Tensor:
        return target.new_zeros(shape, dtype=dtype)

    return Gradients(
        zeros(m) if gs is None else gs,
        zeros(m) if gq is None else gq,
        zeros(m, K) if gc is None else gc,
    )
