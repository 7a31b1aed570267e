"""Every test runs on every device, unless it is marked with `once` and a reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton interprets its kernels. It must know before any module imports them.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Before PyTorch asks cuBLAS for anything: without it products are refused where tests ask for
# deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from _devices import GPU, Placed, capability, constants_moved, lacking, modules_of_tests, moved
from _stand_in import LIMITS, answer_as_a_gpu, load_stand_in

# What these folders and modules test is done on a CPU wherever it is used.
ON_CPU = {
    "checks",
    "clusters",
    "integrations",
    "lab",
    "parallel",
    "test_docs",
    "test_how_it_works",
    "test_private_torch",
    "test_readme",
    "test_site",
}


def pytest_addoption(parser):
    parser.addoption(
        "--stand-in",
        action="store_true",
        help="run the tests on a device that stands in for a GPU as well (needs a C++ compiler)",
    )
    parser.addoption(
        "--stand-in-as-gpu",
        action="store_true",
        help="the same, where its tensors say that they are a GPU's, so that code for GPUs runs",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "once(reason): the test does not run on each device")
    as_gpu = config.getoption("stand_in_as_gpu")
    if as_gpu or config.getoption("stand_in"):
        config.option.stand_in = True
        load_stand_in()  # the first backward of a process counts the devices that there are
    if as_gpu:
        answer_as_a_gpu()


def pytest_generate_tests(metafunc):
    """Without another device tests keep their names."""
    others = ["cuda"] * GPU + ["stand_in"] * metafunc.config.getoption("stand_in")
    marked = metafunc.definition.get_closest_marker("once")
    folder = Path(metafunc.definition.fspath).relative_to(Path(__file__).parent).parts[0]
    if others and not marked and folder.removesuffix(".py") not in ON_CPU:
        metafunc.parametrize("device", ["cpu", *others], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skips a test that asks the stand-in for what PyTorch can do on GPUs alone."""
    try:
        return (yield)
    except Exception as error:
        found = [x for x in LIMITS if x in str(error)]
        if pyfuncitem.funcargs.get("device") == "stand_in" and found:
            pytest.skip(f"PyTorch has no {found[0]} for the stand-in")
        raise


@pytest.fixture
def ctrl_c():
    """Has SIGINT raise KeyboardInterrupt, which a process in the background would ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    """The name of the device on which the tensors of a test are made."""
    name = getattr(request, "param", "cpu")
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if reason := lacking(name, capability(), params):
        pytest.skip(reason)
    if name == "cpu":
        yield name
        return
    for key, value in params.items():
        params[key] = moved(value, name)
    constants_moved(name, modules_of_tests(), monkeypatch)
    with Placed(name):
        yield name
