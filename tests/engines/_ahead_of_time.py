"""Compiles the kernels for a GPU that need not be there, as they would be launched.

Run as a script, without TRITON_INTERPRET; prints what it has compiled. A launch on tensors of
the CPU is compiled with its own arguments in place of being run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from softsphere.engines import fused_rows, row_kernels
from softsphere.engines.engine import Inputs
from softsphere.engines.moments import Moments

HOPPER = GPUTarget("cuda", 90, 32)
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

    def __call__(self, *args: Any, num_warps: int = 4, **named: Any) -> None:
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
        done = triton.compile(source, target=HOPPER, options={"num_warps": num_warps})
        wide = "v4.b32" in done.asm["ptx"]
        print(self.kernel.__name__, "reads 16 bytes at once" if wide else "")


def launch_all(m: int, D: int, d: int, K: int, dtype: torch.dtype, bias: bool) -> None:
    """Every kernel once."""
    wide = torch.promote_types(dtype, torch.float32)
    n, b = d + bias, torch.zeros(D, dtype=dtype) if bias else None
    H, W, target = torch.zeros(m, d, dtype=dtype), torch.zeros(D, d, dtype=dtype), torch.zeros(m, K)
    x = Inputs(H, W, b, target.long(), None)
    at = Moments(*(torch.zeros(*size, dtype=wide) for size in ((n, n), (n,), (n,))), D, not bias)
    P, row, each = (torch.zeros(*size, dtype=wide) for size in ((m, d), (m,), (m, K)))
    fused_rows.sums(x, P, at)
    fused_rows.hidden_gradient(x, P, at, row, each, row if bias else None)
    if dtype in (torch.float16, torch.bfloat16):
        fused_rows.in_parts(H, None, row, H.new_zeros(m, 2 * d), torch.finfo(dtype).eps)
    out = torch.zeros(D, 2 * d, dtype=torch.bfloat16)
    fused_rows.in_parts(W, at.shift[:d], None if bias else W[:, 0].to(wide), out)
    fused_rows.add_target_rows(W, H, x.target, each)


if __name__ == "__main__":
    for name in row_kernels.__all__:
        setattr(row_kernels, name, Compiled(getattr(row_kernels, name)))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        launch_all(128, 512, 2304, 1, dtype, bias=False)
        launch_all(63, 507, 5, 3, dtype, bias=True)
