"""Checks of backward calls and data-parallel wrappers inside accumulate()."""

from __future__ import annotations

from typing import Any

from softsphere._torch import data_parallel_in_forward, runs_in_this_backward

__all__ = ["FIRST_ONLY", "Both", "check_wrapper", "wanted_now"]

# One answer for W, and one for b.
Both = tuple[bool, bool]

FIRST_ONLY = (
    "inside accumulate() there are first derivatives by backward() alone; for second derivatives, "
    "forward mode and torch.func leave the context and use "
    "options=LinearSphericalOptions(engine='dense')"
)


def wanted_now(ctx: Any) -> Both:
    """Whether the running backward is to compute the gradients of W and b.

    Raises RuntimeError if torch.autograd.grad was asked for them, if autograd cannot say, or if it
    would run hooks that are newer than the graph without a gradient.
    """
    # H comes first; without a b the third node would be that of the target, which has none
    ends = [node for node, _ in ctx.next_functions[1:3]]
    found = [end is not None and runs_in_this_backward(end) for end in ends]
    if None in found:
        raise RuntimeError(
            "torch.autograd.grad cannot give the gradients of weight and bias inside accumulate(), "
            "since they are computed when it ends; call backward, or leave the context"
        )
    W, b = (bool(x) for x in found)
    if ctx.stood_in and [W, b] != [end is not None for end in ends]:
        raise RuntimeError(
            "inside accumulate(), with hooks on the gradients of weight or bias or with a process "
            "group, a backward must compute all gradients; call it without inputs=, and "
            "torch.autograd.grad outside the context"
        )
    if (W or b) and not ctx.stood_in and ctx.accumulation.waited_for():
        raise RuntimeError(
            "inside accumulate() a hook on the gradient of weight or bias was registered after a "
            "loss and before its backward; register hooks before the loss, or outside the context"
        )
    return W, b


def check_wrapper() -> None:
    """Checks the DistributedDataParallel whose forward is running, if there is one.

    Raises RuntimeError if it looks for used parameters in the graph of the loss, which does not
    contain those of this layer.
    """
    wrapper = data_parallel_in_forward()
    if wrapper is None:
        return
    for name in ("find_unused_parameters", "static_graph"):
        if getattr(wrapper, name, False):
            raise RuntimeError(
                f"DistributedDataParallel with {name}=True takes the weight for unused inside "
                f"accumulate(); wrap the model with {name}=False, or do without the context"
            )
