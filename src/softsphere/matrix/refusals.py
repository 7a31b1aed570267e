"""The errors for operations that a factored weight cannot do; each says what to use instead."""

from __future__ import annotations

from typing import Any

from softsphere._torch import graph_is_captured

__all__ = [
    "ADAPTIVE",
    "BY_SGD",
    "COMPILED",
    "DISTRIBUTED",
    "HALF",
    "MOMENTUM",
    "foreign",
    "refusal",
    "refuse_in_record",
    "stale",
]

# What to use instead, for the PyTorch tools to which some operations belong.
BY_SGD = (
    "use torch.optim.SGD or softsphere.optim.FactoredSGD, or LinearSphericalLoss for such an "
    "optimizer"
)
ADAPTIVE = (
    f"an optimizer that keeps numbers for each weight, such as Adam, cannot step it: {BY_SGD}"
)
MOMENTUM = (
    "the momentum of this optimizer is a gradient of an earlier weight, which means nothing for "
    "the present one; use softsphere.optim.FactoredSGD, whose momentum is exact. The leaves of a "
    "clustered layer have no momentum: give them a group with momentum=0"
)
DISTRIBUTED = (
    "it cannot be sharded or reduced over processes by a wrapper: give the layer a process_group "
    "and leave it out of the wrapper (softsphere.parallel.leave_out_of_ddp, or ignored_params of "
    "fully_shard), or use LinearSphericalLoss"
)
HALF = (
    "a factored weight must be float32 or float64; use torch.autocast for half precision around it"
)
COMPILED = (
    "a factored weight cannot be part of a compiled graph or an exported program. Its layer stays "
    "out of compiled graphs by itself; head.to_linear() with a criterion, and "
    'LinearSphericalLoss with options=LinearSphericalOptions(engine="dense"), can be compiled '
    "whole and exported"
)
_CLIPPING = "clip its gradient by norm, with torch.nn.utils.clip_grad_norm_"
_NORMS = "use p.norm() ** 2 for the sum of its squares, or the optimizer's weight_decay"
_MASKS = "masks and pruning need a dense weight, as LinearSphericalLoss has"
_STACKING = "weights of several layers cannot be stacked; call the layers one by one"
_INSTEAD = {
    **dict.fromkeys(("zeros_like", "full_like", "new_zeros", "sign", "square", "sqrt"), ADAPTIVE),
    **dict.fromkeys(("addcmul", "addcdiv", "addcmul_", "addcdiv_", "sign_", "sqrt_"), ADAPTIVE),
    **dict.fromkeys(("clamp_", "clamp", "clamp_min_", "clamp_max_"), _CLIPPING),
    **dict.fromkeys(("pow", "abs", "mean", "sum"), _NORMS),
    **dict.fromkeys(("stack", "cat"), _STACKING),
    "ones_like": _MASKS,
    "set_": "a parametrization needs a dense weight, as LinearSphericalLoss has",
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), DISTRIBUTED),
    "view": "DistributedDataParallel, parameters_to_vector and LBFGS need it in one flat array; "
    + DISTRIBUTED,
}
_READ = (
    "read rows with weight[index] or torch.nn.functional.embedding, read all of it with "
    "weight.to_dense(), or use LinearSphericalLoss, whose weight is an ordinary parameter"
)


def refusal(func: Any, what: str, instead: str | None = None) -> TypeError:
    """Makes the error for an operation that is not possible.

    Args:
        func: the operation of torch.ops.
        what: what it was applied to.
        instead: what to do instead. By default this is looked up by the name of the operation.
    """
    name = func.overloadpacket.__name__
    instead = instead or _INSTEAD.get(name.removeprefix("_foreach_"), _READ)
    if func.namespace in ("c10d", "_c10d_functional"):
        instead = DISTRIBUTED
    elif name.startswith("_fused_"):
        instead = ADAPTIVE
    return TypeError(
        f"{func.namespace}.{name} is not possible on {what}: it would need all its D × d numbers, "
        f"which are never formed. {instead[0].upper()}{instead[1:]}"
    )


def foreign() -> RuntimeError:
    """Makes the error for a gradient that meets a whole weight that is not its own."""
    return RuntimeError(
        "the gradient of a loss cannot be added to another weight than its own, nor to the "
        "gradient of a penalty such as weight.norm() ** 2 that came first; call backward of the "
        "loss before that of the penalty, or use weight_decay"
    )


def stale() -> RuntimeError:
    """Makes the error for a gradient that was taken at another weight."""
    return RuntimeError(
        "the gradient of a factored weight belongs to another weight, or to this one before a step "
        "or load_state_dict changed it; call zero_grad() after each step. torch.optim.SGD keeps "
        "such gradients for its momentum: use softsphere.optim.FactoredSGD instead"
    )


def refuse_in_record() -> None:
    """Raises RuntimeError in a record, for what is more than a step.

    Python notes it at once, and memory would follow only when the record is run.
    """
    if graph_is_captured():
        raise RuntimeError(
            "a factored weight cannot be saved, loaded or written as a whole in a step that is "
            "captured or compiled; do so between the steps"
        )
