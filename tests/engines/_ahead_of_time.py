"""Compiles the kernels for a GPU that need not be there, as the engine would launch them.

Run as a script, without TRITON_INTERPRET; prints what it has compiled. A launch on tensors of
the CPU is compiled with its own arguments in place of being run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from softsphere.engines import kernels, launch
from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.triton import symmetric_gram

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 << 10  # of a Hopper multiprocessor, as one program may have it
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Compiled:
        return self

    def __call__(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | named
        assert set(values) == set(names), set(names) ^ set(values)
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            name, x = parameter.name, values[parameter.name]
            # as in a launch, where None and 1 are constants too
            if parameter.is_constexpr or x is None or (type(x) is int and x == 1):
                signature[name], constants[place,] = "constexpr", x
                continue
            tensor = isinstance(x, torch.Tensor)
            signature[name] = TYPES[x.dtype] if tensor else "i32" if x < 1 << 31 else "i64"
            if tensor or x % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        done = triton.compile(source, target=HOPPER, options=options)
        assert done.metadata.shared <= SHARED_MEMORY, (self.kernel, done.metadata.shared)
        tensor_cores = "mma" in done.asm["ptx"]
        print(self.kernel.__name__, signature["W"], "tensor cores" if tensor_cores else "")


def launch_all(m: int, D: int, d: int, K: int, dtype: torch.dtype, given: bool) -> None:
    """Every kernel once; given: with b, pi and the mean of W."""
    H, W = torch.zeros(m, d, dtype=dtype), torch.zeros(D, d, dtype=dtype)
    b, pi = (torch.zeros(D, dtype=dtype), torch.ones(D)) if given else (None, None)
    mean = torch.zeros(m, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x, G = Inputs(H, W, b, torch.zeros(m, K, dtype=torch.long), pi), H.new_zeros(D, m)
    launch.mean_output(x)
    launch.sums(x, mean)
    launch.output_gradient(x, mean, Gradients(mean, mean, mean.new_zeros(m, K)), 0, G)
    launch.gram(W, pi, None)
    if given:
        launch.gram(W, pi, torch.zeros(d))


if __name__ == "__main__":
    with pytest.raises(ValueError, match="needs tensors on a CUDA device"):
        symmetric_gram(torch.zeros(3, 2))
    for name in kernels.__all__:
        setattr(kernels, name, Compiled(getattr(kernels, name)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        launch_all(128, 512, 256, 1, dtype, given=False)
        launch_all(63, 507, 5, 3, dtype, given=True)
    launch_all(1, 1, 1, 1, torch.float32, given=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    launch_all(128, 512, 256, 1, torch.float32, given=True)
