"""Questions to private parts of PyTorch stand in `_torch.py`, and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import softsphere

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
