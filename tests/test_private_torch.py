"""Questions to private parts of PyTorch stand in `_torch.py`, and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import softsphere
from softsphere import _torch

ROOT = Path(softsphere.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "_torch.py"]
# Attributes of tensors, modules and contexts of torch that begin with an underscore.
PRIVATE_ATTRIBUTES = {
    "_active_ddp_module",
    "_backward_hooks",
    "_current_level",
    "_forward_hooks",
    "_make_wrapper_subclass",
    "_post_accumulate_grad_hooks",
    "_version",
    "_will_engine_execute_node",
    "overloads",
}


def private_uses(source: str) -> list[str]:
    """What a source asks of private parts of PyTorch, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr in PRIVATE_ATTRIBUTES:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and node.value in PRIVATE_ATTRIBUTES:
            found.append(f"{node.lineno}: {node.value!r}")
        for name in names:
            head, *parts = name.split(".")
            dunders = [part for part in parts if part.startswith("__")]
            private = [part for part in parts if part.startswith("_") and part not in dunders]
            operations = [part for part in private if part.startswith(("_foreach_", "_to_copy"))]
            if head in ("torch", "forward_ad") and set(private) - set(operations):
                found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_but_one_asks(path):
    assert private_uses(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._len_torch_dispatch_stack()",
        "x = torch._C._functorch",
        "forward_ad._current_level",
        "from torch.utils import _pytree",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "getattr(torch.nn.parallel.DistributedDataParallel, '_active_ddp_module', None)",
        "x._backward_hooks",
        "torch.ops.aten.mm.overloads()",
    ],
)
def test_a_question_is_seen(line):
    assert private_uses(line)


def test_the_import_leaves_the_compiler_of_pytorch_alone():
    """It takes longer than all the rest, and many programs compile nothing."""
    asked = "import sys, torch; before = set(sys.modules); import softsphere; "
    asked += "print({name for name in set(sys.modules) - before if name == 'torch._dynamo'})"
    run = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


@pytest.fixture
def restored():
    """The settings of float32 products are afterwards what they were."""
    places = torch.backends, torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", 0)
    before = [getattr(place, "fp32_precision", None) for place in places]
    yield
    torch.set_float32_matmul_precision("highest")
    for place, value in zip(places, before, strict=True):
        if value is not None:
            place.fp32_precision = value


each_device = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch < 2.9 has one setting for all"
)


def words(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def allowed(backend, value, name="fp32_precision"):
    return lambda: setattr(backend.matmul, name, value)


cuda, mkldnn = torch.backends.cuda, torch.backends.mkldnn
PRECISIONS = {
    "as it is": ([], "highest", "highest"),
    "highest": ([words("highest")], "highest", "highest"),
    "high": ([words("high")], "high", "high"),
    "medium": ([words("medium")], "medium", "medium"),
    "high and back": ([words("high"), words("highest")], "highest", "highest"),
}
OF_A_DEVICE = {
    "allow_tf32": ([allowed(cuda, True, "allow_tf32")], "high", "highest"),
    "tf32": ([allowed(cuda, "tf32")], "high", "highest"),
    "not tf32": ([words("high"), allowed(cuda, "ieee")], "highest", "high"),
    "not TF32, in old words": (
        [words("medium"), allowed(cuda, False, "allow_tf32")],
        "highest",
        "medium",
    ),
    "bf16": ([allowed(mkldnn, "bf16")], "highest", "medium"),
    "both": ([allowed(cuda, "tf32"), allowed(mkldnn, "bf16")], "high", "medium"),
    "mended": ([allowed(cuda, "tf32"), words("medium")], "medium", "medium"),
}


@pytest.mark.parametrize(
    "case", [*PRECISIONS, *(pytest.param(name, marks=each_device) for name in OF_A_DEVICE)]
)
def test_the_precision_of_float32_products(monkeypatch, restored, case):
    """It never raises, in whichever words it was set. PyTorch's own question does."""
    monkeypatch.setattr(_torch, "_lowers_float32", lambda device, precision: True)
    steps, on_gpu, on_cpu = {**PRECISIONS, **OF_A_DEVICE}[case]
    for step in steps:
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _torch.float32_precision(torch.device("cuda", 1)) == on_gpu
        assert _torch.float32_precision(torch.device("cpu")) == on_cpu


def test_a_device_without_faster_float32_products(monkeypatch, restored):
    torch.set_float32_matmul_precision("high")
    gpu = torch.device("cuda", 0)
    for capability, able in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, x=capability: x)
        assert _torch.float32_precision(gpu) == ("high" if able else "highest")
    assert _torch.float32_precision(torch.device("meta")) == "highest"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _torch.float32_precision(gpu) == "highest"


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_products_of_this_cpu_are_exact_if_it_says_so(restored, precision):
    torch.manual_seed(0)
    x, y = torch.randn(200, 200), torch.randn(200, 200)
    exact = x.double() @ y.double()
    torch.set_float32_matmul_precision(precision)
    if _torch.float32_precision(x.device) == "highest":
        assert (x @ y - exact).norm() < 1e-6 * exact.norm()
