"""A loss of torchtitan with a model of its own, beside a dense head computed by hand."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import softsphere

ROOT = Path(__file__).parents[2]
HERE = importlib.util.find_spec("torchtitan") is not None
installed = pytest.mark.skipif(not HERE, reason="torchtitan is not installed")
pytestmark = pytest.mark.once("the models are torchtitan's")


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def model_of(loss, dtype=torch.float64):
    """A model as the trainer makes it for a loss that takes hidden states."""
    from torchtitan.models.llama3 import model_registry

    config = model_registry("debugmodel").model
    config.layers = []  # attention needs a compiler
    torch.manual_seed(0)
    model = config.build()
    model.init_weights(buffer_device=torch.device("cpu"))
    model.lm_head.to(dtype)
    model.norm.register_forward_hook(lambda module, x, out: out.to(dtype))
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    return model


def built(name="taylor_softmax"):
    from softsphere.integrations.torchtitan import LinearLoss

    return LinearLoss.Config(loss=name).build(compile_config=None)


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2048, (2, 17), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :5] = -100
    return tokens[:, :-1], labels, torch.tensor(3 * labels.numel())


@installed
@pytest.mark.parametrize("name", ["taylor_softmax", "z_loss"])
def test_it_is_the_sum_of_a_dense_head_over_all_valid_tokens(name):
    loss = built(name)
    model = model_of(loss)
    tokens, labels, count = batch()
    hidden = model(tokens)
    found, metrics = loss(hidden, labels, count)
    found.backward(retain_graph=True)
    got = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    logits = nn.functional.linear(hidden, model.lm_head.weight)
    criterion = softsphere.SphericalLoss(name, reduction="sum")
    want = criterion(logits.flatten(0, 1), labels.flatten()) / count
    want.backward()
    torch.testing.assert_close(found, want)
    assert metrics == {}
    for key, p in model.named_parameters():
        tolerance = {} if key == "lm_head.weight" else {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(got[key], p.grad, **tolerance, msg=key)


@installed
def test_a_sum_of_bfloat16_rows_is_in_float32():
    loss = built()
    model = model_of(loss, torch.bfloat16)
    tokens, labels, count = batch()
    found, _ = loss(model(tokens), labels, count)
    assert found.dtype == torch.float32
    found.backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


@installed
def test_the_output_layer_may_be_fully_sharded(one_rank):
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch shards on no CPU")
    from torch.distributed.fsdp import fully_shard

    tokens, labels, count = batch()
    results = []
    for sharded in (False, True):
        loss = built()
        model = model_of(loss)
        if sharded:
            fully_shard(model.lm_head, mesh=one_rank)
            fully_shard(model, mesh=one_rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
        loss(model(tokens), labels, count)[0].backward()
        optimizer.step()
        W = model.lm_head.weight
        results.append(W.full_tensor() if sharded else W)
    torch.testing.assert_close(*results)


@installed
def test_an_output_layer_of_another_kind_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (nn.Identity(), Scaled(2, 3)):
        with pytest.raises(TypeError, match=r"lm_head must be a plain nn\.Linear, got"):
            built().set_lm_head(layer)


def test_the_output_layer_computes_outputs_again_after_a_loss(monkeypatch):
    """Also where torchtitan is not installed: of its wrapper this needs the name alone."""
    if not HERE:
        wrapper = type("ChunkedLossWrapper", (), {"Config": type("Config", (), {"__slots__": ()})})
        loss_module = types.SimpleNamespace(ChunkedLossWrapper=wrapper)
        for name in ("torchtitan", "torchtitan.components"):
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace())
        monkeypatch.setitem(sys.modules, "torchtitan.components.loss", loss_module)
    module = importlib.import_module("softsphere.integrations.torchtitan")
    if not HERE:
        monkeypatch.delitem(sys.modules, module.__name__)
    loss = module.LinearLoss(module.LinearLoss.Config())
    layer, hidden = nn.Linear(4, 7), torch.randn(6, 4)
    loss.set_lm_head(layer)
    found, _ = loss(hidden, torch.arange(6))
    want = softsphere.SphericalLoss("taylor_softmax", reduction="sum")(
        layer(hidden), torch.arange(6)
    )
    torch.testing.assert_close(found, want)
    with pytest.raises(ValueError, match="target must be in"):
        loss(hidden, torch.arange(6) + 5)
    assert layer(hidden).shape == (6, 7)
    layer.forward = lambda x: x
    with pytest.raises(TypeError, match=r"lm_head must be a plain nn\.Linear"):
        loss.set_lm_head(layer)


@installed
def test_tensor_parallelism_is_refused(one_rank):
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    loss = built()
    model = model_of(loss)
    parallelize_module(model.lm_head, one_rank, ColwiseParallel())
    tokens, labels, count = batch()
    with pytest.raises(TypeError, match="tensor_parallel_degree"):
        loss(model(tokens), labels, count)


@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="torchtitan is installed, and the other tests run")
def test_all_of_it_where_torchtitan_is_installed(tmp_path):
    """It brings so much that it is kept out of the environment of the other tests."""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    packages = next(tmp_path.glob("lib/python*/site-packages"))
    beside = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "beside.pth").write_text("\n".join([*beside, str(ROOT / "src")]))
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    done = subprocess.run([*pip, "torchtitan==0.3.0"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"torchtitan cannot be installed here: {done.stderr[-300:]}")
    tests = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", Path(__file__)]
    found = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
    assert "skipped" not in found.stdout
