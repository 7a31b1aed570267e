"""The devices of the suite: how tensors come to be on one, and what a GPU must be able to do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from _devices import Placed, lacking
from softsphere import LinearSphericalLoss

pytestmark = pytest.mark.once("the test names its devices")


def as_the_package(code: str) -> torch.Tensor:
    """The value of an expression in a file of the package."""
    return eval(compile(code, "/src/softsphere/heads/made.py", "eval"), {"torch": torch})


def test_tensors_of_a_test_are_made_on_the_device():
    with Placed("meta"):
        made = [torch.ones(2), torch.tensor([1.0]), torch.arange(3), torch.randn(2)]
        made += [*nn.Linear(2, 3).parameters(), *LinearSphericalLoss(2, 3).parameters()]
        elsewhere = torch.ones(2, device="cpu")
    assert all(x.is_meta for x in made)
    assert elsewhere.device.type == torch.ones(2).device.type == "cpu"


def test_the_package_has_a_device_from_its_caller_alone():
    """What it makes without one stays on the CPU, and would meet tensors of another device."""
    with Placed("meta"):
        assert as_the_package("torch.ones(2, device=None)").is_meta
        assert as_the_package("torch.ones(2)").device.type == "cpu"


def test_random_numbers_are_those_of_the_cpu():
    generator = torch.Generator()
    drawn = {
        "by the seed": lambda: torch.randn(3),
        "that want gradients": lambda: torch.rand(3, requires_grad=True),
        "by a generator": lambda: torch.randint(9, (3,), generator=generator),
        "in place": lambda: torch.zeros(3).normal_(generator=generator),
    }
    for name, draw in drawn.items():
        torch.manual_seed(1), generator.manual_seed(2)
        want = draw()
        torch.manual_seed(1), generator.manual_seed(2)
        with Placed("cpu"):
            got = draw()
        assert torch.equal(got, want) and got.requires_grad == want.requires_grad, name


@pytest.mark.parametrize(
    ("name", "gpu", "given", "reason"),
    [
        ("cuda", (7, 5), {"dtype": torch.bfloat16}, "bfloat16 needs compute capability 8.0.* 7.5"),
        ("cuda", (8, 0), {"dtype": torch.bfloat16}, None),
        ("cuda", (7, 5), {"dtype": torch.float16, "m": 3}, None),
        ("cuda", (6, 1), {"kernels": True}, "Triton needs compute capability 7.0.* 6.1"),
        ("cuda", (7, 0), {"kernels": True}, None),
        ("cpu", (9, 0), {"kernels": True}, "Triton compiles kernels for the GPU"),
        ("cpu", (6, 1), {"dtype": torch.bfloat16, "kernels": False}, None),
        ("cpu", None, {"kernels": True}, None),
    ],
)
def test_why_a_test_cannot_run_is_said(name, gpu, given, reason):
    found = lacking(name, gpu, given)
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="compiles C++")
def test_every_test_of_every_device_passes_on_the_stand_in():
    command = [sys.executable, "-m", "pytest", "-q", "--stand-in", "-k", "stand_in and not devices"]
    run = subprocess.run([*command, str(Path(__file__).parent)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
