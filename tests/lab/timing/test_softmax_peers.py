"""The softmaxes that layers are compared with: what each needs, and which of them are exact."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from softsphere_lab.errors import LabError
from softsphere_lab.timing import softmax_peers
from softsphere_lab.timing.memory import extra_bytes
from softsphere_lab.timing.softmax_peers import GPU_SOFTMAX, SOFTMAX, Peer


def test_a_peer_that_is_not_there_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(softmax_peers, "find_spec", lambda module: None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    missing = {name: peer.missing() for name, peer in {**SOFTMAX, **GPU_SOFTMAX}.items()}
    here = [name for name, reason in missing.items() if reason is None]
    chunks = [f"softmax, chunks of {n} rows" for n in (2048, 8192)]
    assert here == ["softmax", "softmax, compiled", *chunks]
    assert missing["Liger"] == "liger-kernel is not installed"
    assert missing["quack"] == "quack-kernels is not installed"
    reason = f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"
    assert missing["core, automatic"] == missing["core, chunk 64"] == reason


def test_a_peer_that_is_there_lacks_nothing_and_is_not_imported_to_know_that():
    """Kernel libraries may take memory of a GPU as soon as they are imported."""
    script = (
        "import sys\n"
        "from softsphere_lab.timing.softmax_peers import Peer\n"
        "assert Peer(None, package='pip', module='this').missing() is None\n"
        "assert 'this' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_peer_has_the_version_of_its_package():
    assert (
        Peer(lambda: softmax_peers.softmax, package="pytest").version() == f" {pytest.__version__}"
    )
    assert GPU_SOFTMAX["softmax"].version() == ""
    assert Peer(lambda: softmax_peers.softmax, package="no-such-package").version() == ""


def test_what_filters_or_sums_in_bfloat16_is_not_exact():
    inexact = [name for name, peer in GPU_SOFTMAX.items() if not peer.is_exact(bfloat16=True)]
    core = [f"core, {how}" for how in ("chunk 1024", "chunk 4096", "automatic")]
    assert inexact == ["Liger", "cut cross-entropy", *core]
    # in float32 the dtype of the weight is enough
    filters = [name for name, peer in GPU_SOFTMAX.items() if not peer.is_exact(bfloat16=False)]
    assert filters == ["cut cross-entropy"]


def liger(monkeypatch, *lacks):
    """A release of Liger-Kernel whose function is called as the real one is, and computes plainly.

    Returns what it was called with.
    """
    called = []

    class Function:
        @staticmethod
        def forward(
            ctx,
            _input,
            weight,
            target,
            bias=None,
            ignore_index=-100,
            accum_dtype=None,
            ce_impl=None,
            chunk_mem_const=1,
        ):
            raise AssertionError("it is called by apply")

        @staticmethod
        def apply(hidden, weight, target, *values):
            called.append(values)
            return softmax_peers.softmax(hidden, weight, target), None

    if lacks:

        def older(ctx, _input, weight, target, bias=None, ignore_index=-100, accum_dtype=None):
            raise AssertionError("it is called by apply")

        Function.forward = staticmethod(older)
    module = types.ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyFunction = Function
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return called


def test_options_of_liger_stand_where_its_release_has_them(monkeypatch):
    called = liger(monkeypatch)
    given = torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 4, 2])
    names = ("Liger", "Liger, float32 sums", "Liger, float32 sums, memory 8")
    for name in names:
        assert GPU_SOFTMAX[name].make()(*given) == softmax_peers.softmax(*given)
    wide = torch.float32
    assert called == [
        (None, -100, None, None, 1),
        (None, -100, wide, None, 1),
        (None, -100, wide, None, 8),
    ]


def test_a_release_of_liger_without_an_option_is_not_measured_as_if_it_had_it(monkeypatch):
    called = liger(monkeypatch, "chunk_mem_const")
    GPU_SOFTMAX["Liger, float32 sums"].make()
    with pytest.raises(LabError, match="this release of Liger-Kernel has no chunk_mem_const"):
        GPU_SOFTMAX["Liger, float32 sums, memory 32"].make()
    assert not called


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13")
@pytest.mark.parametrize("name", [name for name in GPU_SOFTMAX if name.startswith("core")])
def test_softmax_of_pytorch_is_called_as_it_is_meant(name):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (64, 300))
    target = torch.randint(300, (64,))
    found = torch.autograd.grad(GPU_SOFTMAX[name].make()(hidden, weight, target), (hidden, weight))
    plain = torch.autograd.grad(softmax_peers.softmax(hidden, weight, target), (hidden, weight))
    torch.testing.assert_close(found, plain)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13")
def test_softmax_of_pytorch_chooses_chunks_that_keep_no_logits():
    hidden, weight = (torch.randn(n, 4, requires_grad=True) for n in (512, 4000))
    loss, target = GPU_SOFTMAX["core, automatic"].make(), torch.randint(4000, (512,))
    extra = extra_bytes(lambda: loss(hidden, weight, target).backward())
    assert extra < 4 * 512 * 4000 / 4
