"""Every question that the package asks of private parts of PyTorch, each a named function.

A part that a version of PyTorch lacks gets the answer that is safe: more copies or an earlier
error, never a wrong number.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)

from softsphere.unread import step_is_recorded, values_are_unread

__all__ = [
    "DISABLED_TORCH_FUNCTION",
    "TorchDispatchMode",
    "add_each",
    "assert_later",
    "backward_is_running",
    "by_inductor",
    "capturable_state",
    "changed_in_place",
    "copies",
    "data_parallel_in_forward",
    "eager",
    "exporting",
    "float32_precision",
    "forward_mode_active",
    "gather_tensors",
    "gradients_wanted",
    "graph_is_captured",
    "has_gradient_hooks",
    "has_hooks_of_all_modules",
    "has_own_call",
    "has_tangent",
    "hooks_of",
    "ignore_in_data_parallel",
    "ignored_in_data_parallel",
    "integers",
    "is_dtensor",
    "is_plain",
    "is_recorded",
    "is_shared_with_others",
    "is_wrapper",
    "mapped_by_vmap",
    "number_of_results",
    "operation_name",
    "pair_products",
    "products_have_out_dtype",
    "returns_what_it_writes",
    "runs_in_this_backward",
    "saveable_in_exports",
    "sum_of_norms",
    "sums_of_float16_are_rounded",
    "transformed",
    "transforms_active",
    "untraced",
    "usable_now",
    "values_on_cpu",
    "values_readable",
    "version_of",
    "without_torch_function",
    "wrapper_tensor",
    "written_arguments",
    "written_tensors",
]

Function = TypeVar("Function", bound=Callable[..., Any])
Subclass = TypeVar("Subclass", bound=Tensor)

# The `__torch_function__` of a subclass whose operations return plain tensors.
DISABLED_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl


def usable_now(x: Tensor) -> bool:
    """Whether x may be changed in place and saved for a backward: not if inference mode made it."""
    return torch.is_inference_mode_enabled() or not x.is_inference()


def is_shared_with_others(x: Tensor) -> bool:
    """Whether another tensor refers to the memory of x. True where PyTorch cannot say."""
    return users_of_memory(x) > 1


def users_of_memory(x: Tensor) -> int:
    """How many tensors refer to the memory of x. Very many where PyTorch cannot say."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return sys.maxsize
    # how a tensor of its own memory is counted differs between versions
    alone = torch.empty(1, device=x.device)
    users: int = count(x.untyped_storage()._cdata) - count(alone.untyped_storage()._cdata) + 1
    return users


def values_readable(x: Tensor) -> bool:
    """Whether Python may look at the values of x.

    It may not while x is traced or fake, inside torch.func.vmap, or in a subclass of Tensor that
    handles its operations itself.
    """
    if torch.compiler.is_compiling() or x.is_meta or torch._C._len_torch_dispatch_stack():
        return False
    if mapped_by_vmap(x):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return is_plain(x)


def values_on_cpu(x: Tensor) -> bool:
    """Whether Python may look at the values of x without waiting for a device."""
    return x.device.type == "cpu" and not values_are_unread() and values_readable(x)


def assert_later(true: Tensor, message: str) -> None:
    """Has a GPU end with an error unless a boolean () is true, without waiting for it.

    Before a step is compiled a CPU raises ValueError at once, and afterwards when it is taken.
    """
    if true.device.type == "cpu" and values_are_unread() and not step_is_recorded():
        if not bool(true):
            raise ValueError(message)
    else:
        torch._assert_async(true, message)


def transforms_active() -> bool:
    """Whether the caller is inside torch.func.grad, vmap or another such transform."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return ask is not None and bool(ask())


def transformed() -> bool:
    """Whether the caller is inside a torch.func transform or forward-mode differentiation.

    Neither the operators of the engines nor an assignment into a new tensor has a rule for those.
    """
    if torch.compiler.is_compiling():
        return False
    return transforms_active() or forward_mode_active()


def mapped_by_vmap(x: Tensor) -> bool:
    """Whether torch.func.vmap maps over x."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def exporting() -> bool:
    """Whether torch.export records what is done, for batches of other sizes too."""
    # Before torch 2.7 an export could not be told from torch.compile.
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def untraced(function: Function) -> Function:
    """Computes with the values of tensors while a program is traced or exported, as without that.

    It is for what is kept afterwards: a tensor of the trace, of a torch.func transform, or of
    inference mode, which no backward may use, would spoil it.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        # it would also switch gradients on
        outside, unrecorded = torch.inference_mode(False), torch.no_grad()
        with outside, unrecorded, _disable_current_modes(), torch._C._DisableFuncTorch():
            return function(*args)

    return cast(Function, run)


def is_recorded(*given: Tensor | None) -> bool:
    """Whether autograd records a computation with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def integers(x: Tensor) -> list[int]:
    """The values of a vector of integers, also of one that was made in a torch.func transform."""
    # Before torch 2.7 tolist() has no values there.
    return [int(value) for value in x] if transforms_active() else x.tolist()


def forward_mode_active() -> bool:
    """Whether forward-mode derivatives are being computed. False while a graph is compiled."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode derivatives with respect to x are being computed."""
    return forward_mode_active() and forward_ad.unpack_dual(x).tangent is not None


def gradients_wanted(ctx: Any, count: int) -> list[bool]:
    """Whether a running backward has to return the gradients of its first `count` tensors.

    `ctx.needs_input_grad` alone says whether they required a gradient in the forward, which is
    also so for those that torch.autograd.grad has not been asked for.
    """
    nodes = [node for node, _ in ctx.next_functions[:count]]
    return [
        needed and node is not None and runs_in_this_backward(node) is not False
        for needed, node in zip(ctx.needs_input_grad[:count], nodes, strict=True)
    ]


def runs_in_this_backward(node: Any) -> bool | None:
    """Whether the backward that is running computes a node of the graph.

    Returns None for a leaf passed to torch.autograd.grad.
    """
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return None


def backward_is_running() -> bool:
    """Whether this thread is inside a backward."""
    return bool(torch._C._current_graph_task_id() != -1)


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether there are hooks in Python on the gradient of a leaf."""
    return bool(x._backward_hooks or x._post_accumulate_grad_hooks)


def data_parallel_in_forward() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running, if there is one."""
    active: DistributedDataParallel | None = getattr(
        DistributedDataParallel, "_active_ddp_module", None
    )
    return active


def ignored_in_data_parallel(model: nn.Module) -> list[str]:
    """What a DistributedDataParallel of the model leaves out: names of parameters and buffers."""
    return list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))


def ignore_in_data_parallel(model: nn.Module, names: list[str]) -> None:
    """Sets the names that `ignored_in_data_parallel` returns."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def gather_tensors(out: Tensor, x: Tensor, group: Any) -> None:
    """Writes x of every rank into `out`, by the function that this version of PyTorch has."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(out, x, group=group)


def products_have_out_dtype() -> bool:
    """Whether torch.mm of half-precision factors can return float32, on CUDA since torch 2.8."""
    return "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


def sums_of_float16_are_rounded() -> bool:
    """Whether products of float16 are to be summed in float16, so that none can return float32."""
    return bool(getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False))


def float32_precision(device: torch.device) -> str:
    """The precision of products of float32 tensors: "highest", "high" or "medium".

    The words are those of `torch.set_float32_matmul_precision`, and the answer holds for one
    device: "highest" where it has no faster products, or where only another device was allowed to
    use them.
    """
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device.type)
    # Since torch 2.9 each kind of device has a setting of its own.
    own = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # settings of the two ways that no one word describes
        named = "high"
    if own is not None:
        lowered = {"tf32": "medium" if named == "medium" else "high", "bf16": "medium"}
        named = lowered.get(own, "highest")
    faster = named != "highest" and _lowers_float32(device, named)
    return named if faster else "highest"


def _lowers_float32(device: torch.device, precision: str) -> bool:
    """Whether a device has products of float32 tensors that are faster at this precision."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if precision == "medium":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.cpu._is_amx_fp16_supported())


def pair_products(Z: Tensor, W: Tensor, row: Tensor, leaf: Tensor, offsets: Tensor) -> Tensor:
    """z_i · w_k of a list of pairs (P), which is sorted by i: the derivative of `F.embedding_bag`.

    row, leaf: (P) the numbers i and k of each pair. offsets: the first pair of each row of Z.
    """
    derivative = torch.ops.aten._embedding_bag_per_sample_weights_backward
    products: Tensor = derivative(Z.contiguous(), W, leaf, offsets, row, 0)
    return products


def sum_of_norms(tensors: tuple[Tensor, ...]) -> Tensor:
    """Σ|x| over all numbers of some tensors, which is not finite if one of them is not."""
    return torch.stack(torch._foreach_norm(tensors, 1)).sum()


def add_each(tensors: list[Tensor], increments: list[Tensor]) -> None:
    """Adds to each of some tensors in place, on a GPU in one launch if all have one dtype."""
    torch._foreach_add_(tensors, increments)


def copies(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of some tensors in a dtype.

    On a GPU all are written in one launch, if they are contiguous and of one dtype.
    """
    made = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(made, tensors)
    return made


def capturable_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state for `__setstate__` of an optimizer that was made without its constructor.

    As the constructor does, it says that a capturable step may be taken as it is, so that PyTorch's
    step does not warn of that.
    """
    return {**state, "_warned_capturable_if_run_uncaptured": True}


def graph_is_captured() -> bool:
    """Whether a step is recorded, as by a CUDA stream, so that nothing is computed yet."""
    if step_is_recorded():
        return True
    if torch.compiler.is_compiling():  # which need not be able to trace the question
        return False
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def has_own_call(module: nn.Module) -> bool:
    """Whether a call of a module does something else than run its hooks and its forward."""
    names = ("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward")
    return any(
        name in vars(module)
        or getattr(type(module), name, None) is not getattr(nn.Module, name, None)
        for name in names
    )


def has_hooks_of_all_modules() -> bool:
    """Whether there are hooks that the call of every module runs. True where PyTorch cannot say."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    return any(getattr(nn.modules.module, f"_global_{kind}_hooks", True) for kind in kinds)


def hooks_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The hooks that a call of a module runs, and their kinds."""
    for kind in ("forward_pre", "forward", "backward_pre", "backward"):
        for hook in getattr(module, f"_{kind}_hooks", {}).values():
            yield kind.replace("_", " "), hook


def is_dtensor(x: Any) -> bool:
    """Whether x is a tensor of torch.distributed.tensor, which is not imported for the answer."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_wrapper(x: Tensor) -> bool:
    """Whether x is a tensor that wraps others, as sharding makes them."""
    return bool(is_traceable_wrapper_subclass(x))


def saveable_in_exports(kind: type[Any]) -> None:
    """Lets torch.export.save save programs that return a named tuple of this kind."""
    register = getattr(pytree, "_register_namedtuple", None)
    if register is not None:
        register(kind, serialized_type_name=f"softsphere.{kind.__name__}")


def eager(reason: str) -> Callable[[Function], Function]:
    """Leaves a function out of compiled graphs; `reason` is told where a whole graph is wanted.

    torch.compiler.disable imports the compiler, which takes as long as the rest of softsphere. This
    one imports it at the first call, as PyTorch's own optimizers do.
    """

    def wrap(function: Function) -> Function:
        lazy: Any = torch._compile._disable_dynamo(function)
        lazy._torchdynamo_disable, lazy._torchdynamo_disable_msg = True, reason
        return cast(Function, lazy)

    return wrap


def wrapper_tensor(
    kind: type[Subclass],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    strides: tuple[int, ...] | None = None,
) -> Subclass:
    """Makes a tensor of a subclass that has a shape, a dtype and a device, but no memory."""
    make = torch.Tensor._make_wrapper_subclass
    return make(kind, shape, strides=strides, dtype=dtype, device=device)


def without_torch_function() -> AbstractContextManager[Any]:
    """Inside it, operations on tensor subclasses do not call their `__torch_function__`."""
    return cast(AbstractContextManager[Any], torch._C.DisableTorchFunctionSubclass())


def changed_in_place(x: Tensor) -> None:
    """Tells autograd that x was changed by other means than PyTorch's operations.

    A graph that saved x raises then, as it does after every change in place.
    """
    torch.autograd.graph.increment_version(x)


def version_of(x: Tensor) -> int:
    """Counts the changes of x in place. Tensors made in inference mode are not counted."""
    return 0 if x.is_inference() else x._version


def written_arguments(operation: Any) -> list[bool]:
    """Whether an operation of torch.ops writes each of its arguments, by its schema."""
    aliases = [argument.alias_info for argument in operation._schema.arguments]
    return [alias is not None and alias.is_write for alias in aliases]


def written_tensors(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call of an operation of torch.ops writes, in the order of its schema."""
    names = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    written = zip(names, written_arguments(operation), strict=True)
    chosen = [given.get(name) for name, is_written in written if is_written]
    return [x for x in pytree.tree_leaves(chosen) if isinstance(x, Tensor)]


def operation_name(operation: Any) -> str:
    """The name of an operation of torch.ops with its namespace, without that of the overload."""
    name: str = operation._schema.name
    return name


def by_inductor(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., Any]:
    """A graph as a program that TorchInductor has compiled for inputs of these kinds."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own code
        program: Callable[..., Any] = torch._inductor.compile(graph, list(inputs), options)
    return program


def is_plain(x: Tensor) -> bool:
    """Whether the operations of a tensor are not handled by a subclass."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def number_of_results(operation: Any) -> int:
    """How many results an operation of torch.ops has."""
    return len(operation._schema.returns)


def returns_what_it_writes(operation: Any) -> bool:
    """Whether an operation of torch.ops returns nothing but what it has written."""
    return all(result.alias_info is not None for result in operation._schema.returns)
