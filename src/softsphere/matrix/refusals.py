"""Why an operation is not possible on a factored weight, and what is instead."""

from __future__ import annotations

from typing import Any

__all__ = ["ADAPTIVE", "DISTRIBUTED", "HALF", "MOMENTUM", "refusal", "stale"]

# For some operations, which of PyTorch's tools it belongs to and what to use instead.
ADAPTIVE = (
    "an optimizer that keeps numbers for each weight (Adam and its kind) cannot step it: use "
    "torch.optim.SGD or softsphere.optim.FactoredSGD, or LinearSphericalLoss for such an "
    "optimizer"
)
MOMENTUM = (
    "its momentum is a gradient of an earlier weight, which means nothing beside this one; use "
    "softsphere.optim.FactoredSGD, whose momentum is exact"
)
DISTRIBUTED = (
    "It is neither sharded nor reduced over processes yet: train this layer in one process, "
    "without DistributedDataParallel and fully_shard, or use LinearSphericalLoss"
)
CLIPPING = "clip its gradient by norm, with torch.nn.utils.clip_grad_norm_"
NORMS = "the sum of its squares is p.norm() ** 2, and weight_decay works on it"
MASKS = "masks and pruning are for a dense weight, as LinearSphericalLoss has"
STACKING = "weights of several layers cannot be stacked; call the layers one by one"
HALF = "a factored weight is float32 or float64; for half precision around it use torch.autocast"
INSTEAD = {
    **dict.fromkeys(("zeros_like", "full_like", "new_zeros", "sign", "square", "sqrt"), ADAPTIVE),
    **dict.fromkeys(("addcmul", "addcdiv", "addcmul_", "addcdiv_", "sign_", "sqrt_"), ADAPTIVE),
    **dict.fromkeys(("clamp_", "clamp", "clamp_min_", "clamp_max_"), CLIPPING),
    **dict.fromkeys(("pow", "abs", "mean", "sum"), NORMS),
    **dict.fromkeys(("stack", "cat"), STACKING),
    "ones_like": MASKS,
    "set_": "a parametrization is for a dense weight, as LinearSphericalLoss has",
    **dict.fromkeys(("split", "chunk", "split_with_sizes"), DISTRIBUTED),
    "view": "DistributedDataParallel, parameters_to_vector and LBFGS want it in one flat array. "
    + DISTRIBUTED,
}
READ = (
    "read rows with weight[index] or torch.nn.functional.embedding, all of it with "
    "weight.to_dense(), or use LinearSphericalLoss, whose weight is an ordinary parameter"
)


def refusal(func: Any, what: str, instead: str | None = None) -> TypeError:
    """Why an operation is not possible, and what is."""
    name = func.overloadpacket.__name__
    instead = instead or INSTEAD.get(name.removeprefix("_foreach_"), READ)
    if func.namespace in ("c10d", "_c10d_functional"):
        instead = DISTRIBUTED
    elif name.startswith("_fused_"):
        instead = ADAPTIVE
    return TypeError(
        f"{func.namespace}.{name} is not possible on {what}: it would need all its D × d numbers, "
        f"which are never formed. {instead[0].upper()}{instead[1:]}"
    )


def stale() -> RuntimeError:
    """The error for a gradient of an earlier weight."""
    return RuntimeError(
        "the gradient of a factored weight belongs to another weight, or to this one before a step "
        "or load_state_dict changed it; call zero_grad() after each step. torch.optim.SGD keeps "
        "such gradients for momentum: use softsphere.optim.FactoredSGD for that"
    )
