"""The kernels that pass over rows beside PyTorch's operations; without a GPU they are interpreted.

A pass that joins `PASSES` is compared with its twin in every dtype, with strides, and on memory
that is full of NaN.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import deterministic

from _devices import KERNEL_DEVICE
from _matrix_units import needs_triton, with_kernels, without_kernels
from softsphere import LinearSphericalOptions
from softsphere.engines import bfloat16_parts, fused_rows, moments, quadratic_rows
from softsphere.engines.engine import Gradients, Inputs
from softsphere.engines.target_rows import TargetRows
from softsphere.functional import linear_spherical_loss

pytestmark = [needs_triton, pytest.mark.once("the kernels run where Triton runs them")]
DEVICE = KERNEL_DEVICE
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poison():
    """Every tensor that is not filled has NaN in it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert deterministic.fill_uninitialized_memory
    assert torch.empty(3, device=DEVICE).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def problem(m, D, d, K, dtype=torch.float64, bias=False, strided=False, centred=False):
    """Inputs, their moments, and gradients of their statistics."""

    def new(*shape):
        x = torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype) + 1
        return x.mT.contiguous().mT if strided and x.dim() == 2 else x

    H, W, b = new(m, d), new(D, d), new(D) if bias else None
    x = Inputs(H, W, b, torch.randint(D, (m, K), device=DEVICE), None)
    wide = torch.promote_types(dtype, torch.float32)
    at = moments.moments(x, centred, 100, wide)
    # a rest of the mean row, as where the shift is the mean of some rows, or none at all
    at = at._replace(shift=at.shift / 2, rest=at.rest + at.shift / 2)
    g = Gradients(*(torch.randn(*size, device=DEVICE).to(wide) for size in ((m,), (m,), (m, K))))
    return x, at, g


def rows_of_S(x, at):
    d = x.W.shape[1]
    P = x.H.to(at.S.dtype) @ at.S[:d, :d]
    return P if x.b is None else P + at.S[d, :d]


def sums(x, at, g, fused):
    make = fused_rows.sums if fused else quadratic_rows._sums
    return make(x, rows_of_S(x, at), at)


def hidden_gradient(x, at, g, fused):
    make = fused_rows.hidden_gradient if fused else quadratic_rows._hidden_gradient
    of_mean = None if at.centred else g.s
    return [make(x, rows_of_S(x, at), at, g.q, g.c, of_mean)]


def in_parts(x, at, g, fused):
    """Into half precision, and into float32 that has bfloat16 digits; one part, or two."""
    d, shift, factor = x.W.shape[1], at.shift[: x.W.shape[1]].float(), g.q.float()
    made = [
        (x.W, shift, None, x.W.new_empty(len(x.W), 2 * d, dtype=torch.bfloat16)),
        (x.H, None, factor, x.H.new_empty(len(x.H), 2 * d, dtype=torch.float32)),
        (x.H, shift, factor, x.H.new_empty(len(x.H), d, dtype=torch.bfloat16)),
        (x.H, None, factor, x.H.new_empty(len(x.H), 2 * d, dtype=torch.float16)),
    ]
    for *given, out in made:
        eps = torch.finfo(torch.float16).eps if out.dtype == torch.float16 else 1.0
        (fused_rows.in_parts if fused else bfloat16_parts._write_parts)(*given, out, eps)
        out[:, d:] *= eps
    first = made[3][3][:, :d].float()
    return [*(out.unflatten(1, (-1, d)).float().sum(1) for *_, out in made), first]


def add_target_rows(x, at, g, fused):
    out = x.W.to(g.c.dtype, copy=True)
    if fused:
        fused_rows.add_target_rows(out, x.H, x.target, g.c)
    else:
        with pytest.MonkeyPatch.context() as patch:
            without_kernels(patch)
            TargetRows(x.H, x.target, g.c).add_to(out, slice(0, len(out)), deterministic=True)
    return [out]


PASSES = {f.__name__: f for f in (sums, hidden_gradient, in_parts, add_target_rows)}


# Numbers of few digits in float32. Triton's interpreter rounds to bfloat16 by cutting off.
EPS = {"in_parts": [2.0**-19, 2.0**-19, 2.0**-12, 2.0**-23, 2.0**-23]}


def test_every_pass_is_compared():
    assert set(PASSES) == set(fused_rows.__all__) - {"usable"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "given", ["", "bias", "strided", "centred", "bias strided centred"], ids=lambda x: x or "plain"
)
@pytest.mark.parametrize("name", PASSES)
def test_a_kernel_gives_what_operations_give(name, given, dtype):
    x, at, g = problem(5, 9, 37, 3, dtype, *(word in given for word in ("bias", "strided")))
    at = at._replace(centred="centred" in given)
    both = zip(PASSES[name](x, at, g, True), PASSES[name](x, at, g, False), strict=True)
    for i, (got, want) in enumerate(both):
        assert got.dtype == want.dtype and got.shape == want.shape
        eps = EPS[name][i] if name in EPS else torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got, want, rtol=40 * eps, atol=40 * eps * float(want.abs().max())
        )


@pytest.mark.parametrize("size", [(0, 5, 3, 1), (1, 1, 1, 1), (4, 9, 2, 0), (5, 3, 1500, 2)])
@pytest.mark.parametrize("name", PASSES)
def test_the_smallest_sizes_and_rows_of_several_blocks(name, size):
    x, at, g = problem(*size, bias=True)
    both = zip(PASSES[name](x, at, g, True), PASSES[name](x, at, g, False), strict=True)
    for i, (got, want) in enumerate(both):
        least = 40 * EPS[name][i] if name in EPS else 1e-10
        torch.testing.assert_close(got, want, rtol=least, atol=least * size[2] * size[1])


def test_rows_of_one_target_are_summed_before_they_are_rounded():
    H, out = torch.ones(300, 4, device=DEVICE).bfloat16(), torch.zeros(5, 4, device=DEVICE)
    out = out.bfloat16()
    target = torch.full((300, 1), 3, device=DEVICE)
    fused_rows.add_target_rows(out, H, target, torch.full((300, 1), 1.01, device=DEVICE))
    # one after another in bfloat16 they would stop at 256
    assert (out[3].float() - 303).abs().max() <= 1 and not out[:3].any() and not out[4].any()


def test_rows_with_a_factor_of_zero_add_nothing():
    """Also where they are the most, as ignored rows may be, and hold what is not finite."""
    H, out = torch.ones(40, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    H[5:], factor = torch.nan, torch.zeros(40, 1, device=DEVICE)
    factor[:5] = 1
    fused_rows.add_target_rows(out, H, torch.zeros(40, 1, device=DEVICE).long(), factor)
    assert (out[0] == 5).all() and not out[1:].any()


def test_a_bias_may_cancel_a_column_of_the_mean_row():
    H, W = torch.randn(20, 8, device=DEVICE), 0.1 * torch.randn(90, 8, device=DEVICE)
    H[:, 0], W[:, 0], b = 1, 1e4, torch.full((90,), 1 - 1e4, device=DEVICE)
    x = Inputs(H, W, b, torch.zeros(20, 1, device=DEVICE).long(), None)
    at = moments.moments(x, True, 100, torch.float32)
    want = H.double() @ W.double().mean(0) + b.double().mean()
    error = (fused_rows.sums(x, rows_of_S(x, at), at)[1] - want).abs().max()
    # rounded before the bias is added, it would be wrong by some 1e-4
    assert error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_by_kernels(monkeypatch, dtype):
    """The whole gram engine, forward and backward, with a bias and targets that repeat."""
    H, W, b = torch.randn(9, 12), torch.randn(90, 12), torch.randn(90)
    target = torch.randint(3, (9,), device=DEVICE)

    def run():
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in (H, W, b)]
        loss = linear_spherical_loss(
            *leaves[:2],
            target,
            "taylor_softmax",
            linear_bias=leaves[2],
            options=LinearSphericalOptions("gram"),
        )
        return [loss, *torch.autograd.grad(loss, leaves)]

    without_kernels(monkeypatch)
    want, launched = run(), with_kernels(monkeypatch)
    for got, x in zip(run(), want, strict=True):
        torch.testing.assert_close(got, x)
    assert launched == {"sums": 1, "hidden_gradient": 1, "add_target_rows": 1}


def test_the_kernels_run_where_there_is_a_gpu_and_triton(monkeypatch):
    on_cpu, on_gpu = torch.zeros(1), torch.zeros(1, device="meta")
    assert not fused_rows.usable(on_cpu)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    monkeypatch.setattr(fused_rows, "_runs_on", lambda device: device.type == "meta")
    assert fused_rows.usable(on_gpu)
    monkeypatch.setattr(fused_rows, "_INSTALLED", False)
    assert not fused_rows.usable(on_gpu)


def test_without_a_compiler_the_operations_run_and_one_warning_says_why(monkeypatch):
    fused_rows._runs_on.cache_clear()
    assert fused_rows._runs_on(torch.device(DEVICE))

    def no_compiler():
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(fused_rows, "_kernels", no_compiler)
    assert fused_rows._runs_on(torch.device(DEVICE))  # it was asked once
    fused_rows._runs_on.cache_clear()
    with pytest.warns(UserWarning, match="Triton cannot build a kernel.*find C compiler"):
        assert not fused_rows._runs_on(torch.device(DEVICE))
    assert not fused_rows._runs_on(torch.device(DEVICE))
    fused_rows._runs_on.cache_clear()


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    pytest.importorskip("triton", "3.3", "the arguments of ASTSource were others")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    script = str(Path(__file__).with_name("_ahead_of_time.py"))
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # four kernels for four dtypes, and the parts of rows of half precision
    assert len(run.stdout.splitlines()) == 2 * (4 * 4 + 2)
