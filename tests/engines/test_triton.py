"""The Triton engine beside explicit products in float64; without a GPU, Triton interprets it.

The file is long since all of its tests share a fixture that fills new tensors with NaN.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from softsphere import LinearSphericalOptions  # noqa: E402
from softsphere.engines import launch, triton  # noqa: E402
from softsphere.engines.dispatch import linear_statistics  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def Options(**given):
    return LinearSphericalOptions(engine="triton", **given)


@pytest.fixture(autouse=True)
def poison():
    """Every tensor that is not filled has NaN in it."""
    assert CUDA or launch.INTERPRETED, "the kernels were imported before TRITON_INTERPRET was set"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert deterministic.fill_uninitialized_memory
    assert torch.empty(3, device=DEVICE).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


@dataclass
class Case:
    H: Tensor
    W: Tensor
    b: Tensor | None
    target: Tensor
    pi: Tensor | None
    centred: bool

    def statistics(
        self, options: LinearSphericalOptions | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = linear_statistics(
            self.H,
            self.W,
            self.b,
            self.target,
            self.pi,
            centred=self.centred,
            options=options or Options(),
        )
        assert x.mass == len(self.W) and x.y is None
        assert x.pi is None if self.pi is None else torch.equal(x.pi, self.pi[self.target])
        return x.s, x.q, x.c

    def explicit(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same by o in memory, in the type of H."""
        o = self.H @ self.W.mT
        if self.b is not None:
            o = o + self.b
        pi = torch.ones_like(o[0]) if self.pi is None else self.pi.to(o.dtype)
        if self.centred:
            o = o - (o * pi).sum(1, keepdim=True) / pi.sum()
        s = (o * pi).sum(1)
        return 0 * s if self.centred else s, (o * o * pi).sum(1), o.gather(1, self.target)

    def to(self, dtype: torch.dtype) -> Case:
        """Leaves of another type, with the same values."""
        H, W, b = (
            None if x is None else x.detach().to(dtype).requires_grad_()
            for x in (self.H, self.W, self.b)
        )
        return Case(H, W, b, self.target, self.pi, self.centred)

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.H, self.W, self.b) if x is not None]

    def gradients(self, x: tuple[Tensor, ...], upstream: tuple[Tensor, ...]) -> list[Tensor]:
        total = sum((a * g).sum() for a, g in zip(x, upstream, strict=True))
        return list(torch.autograd.grad(total, self.leaves()))


def make(m: int, D: int, d: int, K: int, *, centred=False, prior=False, bias=False) -> Case:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_()

    pi = torch.rand(D, dtype=torch.float64, device=DEVICE) + 0.1 if prior else None
    return Case(
        leaf(m, d),
        leaf(D, d),
        leaf(D) if bias else None,
        torch.randint(D, (m, K), device=DEVICE),
        None if pi is None else pi * D / pi.sum(),
        centred,
    )


def upstream(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(a) for a in x)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def assert_same(got, want, tolerance: float = 1e-10) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < tolerance


@pytest.mark.parametrize(
    ("centred", "prior", "bias"), list(product([False, True], repeat=3)), ids=str
)
@pytest.mark.parametrize("size", [(63, 507, 5, 1), (70, 129, 70, 3)], ids=str)
def test_values_and_gradients(size, centred, prior, bias):
    case = make(*size, centred=centred, prior=prior, bias=bias)
    got, want = case.statistics(Options(class_chunk=100)), case.explicit()
    assert_same(got, want)
    g = upstream(want)
    assert_same(case.gradients(got, g), case.gradients(want, g))


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 300, 7, 2), (5, 1, 33, 2), (2, 3, 4, 0)])
@pytest.mark.parametrize("centred", [False, True])
def test_the_smallest_sizes(size, centred):
    case = make(*size, centred=centred, bias=True)
    got, want = case.statistics(), case.explicit()
    assert_same(got, want)
    if centred and size[1] == 1:
        assert not got[1].any() and not got[2].any()
    g = upstream(want)
    for a, b in zip(case.gradients(got, g), case.gradients(want, g), strict=True):
        # of one class, centred, they are 0 beside terms of size 1
        assert (a - b).norm() < 1e-10 * b.norm().clamp_min(1e-3)


@pytest.mark.parametrize("centred", [False, True])
def test_no_rows(centred):
    case = make(0, 20, 5, 2, centred=centred, bias=True)
    x = case.statistics()
    assert [a.shape for a in x] == [(0,), (0,), (0, 2)]
    for leaf, g in zip(case.leaves(), case.gradients(x, x), strict=True):
        assert g.shape == leaf.shape and not g.any()


def test_targets_that_repeat():
    case = make(40, 90, 6, 3)
    case.target.copy_(torch.tensor([89, 0, 89]))
    got, want = case.statistics(), case.explicit()
    g = upstream(want)
    assert_same(case.gradients(got, g), case.gradients(want, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("centred", [False, True])
def test_types_as_exact_as_plain_pytorch(dtype, centred):
    """Statistics keep float32's digits whatever the type; gradients those of o in memory."""
    case = make(40, 300, 80, 2, centred=centred, prior=True, bias=True).to(dtype)
    exact, plain = case.to(torch.float64), case.explicit()
    got, want = case.statistics(), exact.explicit()
    assert all(x.dtype == torch.float32 for x in got)
    assert_same(got, want, tolerance=3e-6)
    g = tuple(x.to(dtype).double() for x in upstream(want))
    mine = case.gradients(got, tuple(x.float() for x in g))
    plainly = case.gradients(plain, tuple(x.to(dtype) for x in g))
    for a, b, c in zip(mine, plainly, exact.gradients(want, g), strict=True):
        assert a.dtype == dtype
        assert error(a, c) < 1.2 * error(b, c)


def test_transposed_strided_and_expanded():
    case = make(9, 130, 34, 2, prior=True, bias=True, centred=True)
    plain = [x.detach() for x in case.leaves()]
    case.H = plain[0].repeat_interleave(2, 1)[:, ::2].requires_grad_()
    case.W = plain[1].mT.contiguous().mT.requires_grad_()
    case.b = plain[2].repeat_interleave(3)[::3].requires_grad_()
    case.pi = case.pi.repeat_interleave(2)[::2]
    case.target = case.target.mT.contiguous().mT
    assert not case.H.is_contiguous() and not case.W.is_contiguous()
    got, want = case.statistics(), case.explicit()
    assert_same(got, want)
    # of a sum the upstream gradient is one number, expanded
    x, y = (torch.autograd.grad(q.sum() + c.sum(), case.leaves()) for _, q, c in (got, want))
    assert_same(x, y)
    row = case.H.detach()[0].expand(9, 34).requires_grad_()
    case.H = row
    assert_same(case.statistics(), case.explicit())


def test_a_graph_that_is_kept():
    case = make(20, 90, 8, 1, bias=True)
    got, want = case.statistics(), case.explicit()
    for only in range(3):
        x, y = (torch.autograd.grad(z[only].sum(), case.H, retain_graph=True) for z in (got, want))
        assert_same(x, y)
    (g,) = torch.autograd.grad(got[1].sum(), case.H, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives alone.*dense"):
        g.sum().backward()


@pytest.mark.parametrize("needs", list(product([False, True], repeat=3))[1:], ids=str)
def test_only_what_is_needed(needs, monkeypatch):
    case = make(6, 70, 8, 1, bias=True)
    for x, need in zip(case.leaves(), needs, strict=True):
        x.requires_grad_(need)
    products = []
    monkeypatch.setattr(torch, "mm", lambda *a, mm=torch.mm, **k: products.append(1) or mm(*a, **k))
    got, want = case.statistics(), case.explicit()
    wanted = [x for x in case.leaves() if x.requires_grad]
    x, y = (torch.autograd.grad(z[0].sum() + z[1].sum(), wanted) for z in (want, got))
    assert len(products) == needs[1]
    assert_same(x, y)


def test_blocks_of_the_gradient_are_bounded(monkeypatch):
    sizes = []

    def spy(*args, real=launch.output_gradient):
        sizes.append(args[-1].numel())
        real(*args)

    monkeypatch.setattr(launch, "output_gradient", spy)
    monkeypatch.setattr(triton, "_BLOCK", 10_000)
    case = make(33, 700, 6, 1)
    got, want = case.statistics(), case.explicit()
    assert_same(case.gradients(got, got), case.gradients(want, want))
    assert max(sizes) <= 10_000 and sum(sizes) == 33 * 700 and len(sizes) == 3


def test_far_from_the_origin():
    """A common part of all outputs costs no digits of what is centred, beyond those of o."""
    case = make(20, 400, 16, 1, centred=True, prior=True)
    with torch.no_grad():
        case.W += 300 * torch.randn(16, dtype=torch.float64, device=DEVICE)
    case = case.to(torch.float32)
    exact = case.to(torch.float64)
    want = exact.explicit()
    assert_same(case.statistics(), want, tolerance=2 * error(case.explicit()[2], want[2]))


def test_equal_outputs_centred_are_zero():
    case = make(40, 507, 16, 1, centred=True, prior=True).to(torch.float32)
    case.W = case.W.detach()[:1].repeat(507, 1)
    assert not case.statistics()[1].any()


@pytest.mark.parametrize("axis", ["class", "column"])
def test_offsets_beyond_31_bits(axis):
    """Of W only the pages of its few entries are ever touched; in between there is nothing."""
    step = 1 << 30 if axis == "class" else 1 << 29
    before, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, False
    try:
        far = torch.empty((1 << 31) + 8, dtype=torch.float16, device=DEVICE)
    finally:
        deterministic.fill_uninitialized_memory = before
    W = far.as_strided((3, 5), (step, 1) if axis == "class" else (1, step))
    W.copy_(torch.randn(3, 5))
    case = make(4, 3, 5, 1, centred=True).to(torch.float16)
    case.W = W.requires_grad_()
    exact = case.to(torch.float64)
    exact.W = W.detach().contiguous().double().requires_grad_()
    got, want = case.statistics(), exact.explicit()
    assert_same(got, want, tolerance=1e-5)
    assert error(triton.symmetric_gram(W.detach()), exact.W.mT @ exact.W) < 1e-5
    g = upstream(want)
    mine = case.gradients(got, tuple(x.float() for x in g))
    assert_same(mine, exact.gradients(want, g), tolerance=2e-3)


@pytest.mark.parametrize(("prior", "centred"), list(product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("D, d", [(1, 1), (507, 5), (90, 150)])  # noqa: PT006
def test_gram(D, d, prior, centred):
    case = make(1, D, d, 1, prior=prior)
    W, pi = case.W.detach().mT.contiguous().mT, case.pi
    mean = torch.randn(d, dtype=torch.float64, device=DEVICE) if centred else None
    V = W if mean is None else W - mean
    Q = triton.symmetric_gram(W, pi, mean)
    assert torch.equal(Q, Q.mT)
    assert error(Q, V.mT @ (V if pi is None else pi[:, None] * V)) < 1e-12


def test_gram_makes_half_of_it(monkeypatch):
    made = []
    triu = torch.Tensor.triu
    monkeypatch.setattr(torch.Tensor, "triu", lambda x, *a: made.append(x) or triu(x, *a))
    triton.symmetric_gram(torch.ones(20, 150, dtype=torch.float64, device=DEVICE))
    assert made[0][64:, :64].isnan().all() and made[0][:64].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_keeps_the_digits_of_float32(dtype):
    case = make(1, 300, 40, 1, prior=True).to(dtype)
    W, pi, mean = case.W.detach(), case.pi, case.W.detach().mean(0)
    V = W.double() - mean.double()
    assert triton.symmetric_gram(W).dtype == torch.float32
    assert error(triton.symmetric_gram(W), W.double().mT @ W.double()) < 1e-6
    assert error(triton.symmetric_gram(W, pi, mean), V.mT @ (pi[:, None] * V)) < 1e-6


def test_the_same_bits_twice():
    case = make(70, 507, 33, 2, prior=True, centred=True).to(torch.float32)
    runs = []
    for _ in range(2):
        x = case.statistics(Options(class_chunk=128))
        runs.append([*x, *case.gradients(x, x)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_operator_of_the_gram_kernel():
    case = make(3, 20, 4, 2, prior=True)
    torch.library.opcheck(triton._gram_operator, (case.W.detach(), case.pi, None))


def test_rounds_products_as_pytorch_does(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        assert launch.input_precision(torch.float32) == "tf32"
        assert launch.input_precision(torch.float64) == "ieee"
        matmul.allow_tf32 = False
        assert launch.input_precision(torch.float32) == "ieee"
    finally:
        matmul.allow_tf32 = before


def test_says_what_it_cannot_do():
    case = make(2, 3, 4, 1)
    case.H = case.H.detach().float()
    with pytest.raises(TypeError, match=r"got torch\.float32 and torch\.float64; convert"):
        case.statistics()
    with pytest.raises(TypeError, match=r"accumulate_dtype = torch\.float64; convert"):
        case.to(torch.float32).statistics(Options(accumulate_dtype=torch.float64))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        triton.symmetric_gram(torch.ones(2, 2, dtype=torch.long, device=DEVICE))


def python(*args: str) -> str:
    """What a new interpreter prints, one that does not interpret kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_without_triton():
    says = python(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch, softsphere\n"
        "how = softsphere.LinearSphericalOptions(engine='triton')\n"
        "head = softsphere.LinearSphericalLoss(2, 3, options=how)\n"
        "try:\n    head(torch.ones(1, 2), torch.tensor([0]))\n"
        "except ImportError as e:\n    print(e)",
    )
    assert "`pip install triton`" in says


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton", "3.3", "the arguments of ASTSource were others")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = python(str(Path(__file__).with_name("_ahead_of_time.py"))).splitlines()
    assert len(done) == 3 * 4 + 5 * 5
    # all products but those of float32 without TF32
    assert sum("tensor cores" in line for line in done) == 2 * (3 + 4) + 4
