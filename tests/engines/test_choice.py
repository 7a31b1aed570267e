"""The choice of an engine: pure, explained, and never one that collapses."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from softsphere import LinearSphericalOptions
from softsphere.engines import choose, chunked, dispatch, moments
from softsphere.engines.dispatch import linear_statistics
from softsphere.engines.engine import Inputs, Settings, Workload
from softsphere.engines.machines import machine
from softsphere.functional import linear_spherical_loss
from softsphere.rounding import MOST_TERMS

SIZES = list(
    itertools.product(
        (0, 1, 7, 64, 1024, 32768),
        (1, 100, 50_257, 1_000_000, 100_000_000),
        (1, 64, 768, 8192),
        (torch.float32, torch.bfloat16),
        ("cpu", "cuda"),
    )
)


def test_it_is_pure_and_gives_its_numbers():
    for size in SIZES:
        one, two = choose(*size), choose(*size)
        assert one == two
        assert one.engine in ("dense", "gram", "chunked")
        assert len(re.findall(r"\d", one.reason)) >= 5
        assert one.reason.startswith(f"{one.engine} is the cheapest that fits")


def test_dense_outputs_are_never_larger_than_the_limit():
    for m, D, d, dtype, device in SIZES:
        if choose(m, D, d, dtype, device).engine == "dense":
            assert 4 * m * D * dtype.itemsize <= machine(device, dtype).logits_limit


# m, D, d and the engine, by the dtype and the device
KNOWN = {
    (torch.float32, "cpu"): [
        (2048, 100_000, 512, "gram"),
        (1024, 262_144, 256, "gram"),
        (1024, 1_000_000, 64, "gram"),
        (8192, 256_000, 2304, "gram"),
        (4, 1000, 512, "dense"),
        (32, 50_000, 1024, "dense"),
        (128, 2_810_000, 768, "chunked"),
    ],
    (torch.bfloat16, "cuda"): [
        (8192, 256_000, 2304, "gram"),
        (16384, 248_320, 2048, "gram"),
        (32768, 128_256, 4096, "gram"),
        (16384, 50_304, 768, "gram"),
        (25600, 1_000_000, 128, "gram"),
        (4096, 128_256, 4096, "gram"),
        (1024, 128_256, 4096, "dense"),
        (64, 128_256, 4096, "dense"),
        (1024, 1_000_000, 4096, "chunked"),
    ],
}


@pytest.mark.parametrize("where", KNOWN, ids=str)
def test_known_workloads(where):
    for *sizes, engine in KNOWN[where]:
        assert choose(*sizes, *where).engine == engine, sizes


def test_a_loss_that_sees_no_shift_has_products_in_float32(monkeypatch):
    """In chunks on a GPU, which multiplies half precision as it is since torch 2.8."""
    monkeypatch.setattr("softsphere.engines.engine._HALVES_ARE_MULTIPLIED", True)
    sizes = 512, 1_000_000, 4096
    for dtype, device, other in (
        (torch.bfloat16, "cuda", "gram"),
        (torch.float32, "cuda", "chunked"),
        (torch.bfloat16, "cpu", "chunked"),
    ):
        assert choose(*sizes, dtype, device).engine == "chunked"
        assert choose(*sizes, dtype, device, shift_invariant=True).engine == other
    asked = []
    monkeypatch.setattr(dispatch, "cheapest", lambda work: asked.append(work.centred) or "chunked")
    H, W, target = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3, dtype=torch.long)
    for name in ("z_loss", "taylor_softmax"):
        linear_spherical_loss(H, W, target, name)
    assert asked == [True, False]
    gram, work = dispatch.ENGINES["gram"].cost, Workload(*sizes, 1, 0, torch.bfloat16, "cuda")
    as_it_is = gram(work)
    monkeypatch.setattr("softsphere.engines.engine._HALVES_ARE_MULTIPLIED", False)
    assert gram(work) > 10 * as_it_is
    reasons = [choose(*sizes, torch.bfloat16, "cuda", shift_invariant=x).reason for x in (0, 1)]
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["taylor_softmax", "z_loss"])
@pytest.mark.parametrize("prior", [False, True])
def test_outputs_take_no_more_than_is_counted(name, dtype, prior):
    m, D, d = 64, 20_000, 8
    H, W = torch.randn(m, d, dtype=dtype), torch.randn(D, d, dtype=dtype, requires_grad=True)
    pi = torch.rand(D) + 0.1 if prior else None
    options = LinearSphericalOptions(engine="dense")
    target = torch.randint(D, (m,))
    # acc_events: PyTorch 2.11 warns in a first profile without it
    kinds = [ProfilerActivity.CPU]
    with profile(activities=kinds, profile_memory=True, acc_events=True) as recorded:
        linear_spherical_loss(H, W, target, name, prior=pi, options=options).backward()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak <= 1.1 * Workload(m, D, d, 1, 0, dtype, "cpu").outputs_bytes + 8 * W.numel()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((-1, 10, 4, torch.float32), "m must be at least 0, got -1"),
        ((1, 10.5, 4, torch.float32), "num_classes must be an integer"),
        ((1, 10, 4, torch.int64), "dtype must be a floating-point"),
        ((1, 10, 4, "float32"), "dtype must be a floating-point"),
    ],
)
def test_wrong_sizes_are_named(sizes, words):
    with pytest.raises((TypeError, ValueError), match=words):
        choose(*sizes, "cpu")


def test_targets_and_bias_count():
    sizes = 256, 2000, 64, torch.float32, "cpu"
    assert choose(*sizes).engine == "gram"
    assert choose(*sizes, K=10_000).engine == "dense"
    assert choose(*sizes, bias=True).reason != choose(*sizes).reason


def test_chunks_do_not_shrink_with_the_shape():
    """Tiles of a size that follows from D/d come down to single rows where D/d ≥ m."""

    def of_width(d):
        return Inputs(torch.empty(1, d), torch.empty(1, d), None, torch.zeros(1, 1), None)

    for on_gpu in (False, True):
        settings = Settings(False, None, None, torch.float32, False)
        rows, classes = chunked.tile(settings, on_gpu=on_gpu)
        assert rows >= 256 and 256 <= classes <= MOST_TERMS
    for d in (1, 64, 8192, 1 << 20):
        assert moments.chunk_size(of_width(d), None, torch.float32) >= 256
    assert moments.chunk_size(of_width(64), 10, torch.float32) == 10


@pytest.mark.once("it names its devices")
def test_auto_asks_and_a_name_does_not(monkeypatch):
    asked = []

    def chosen(work):
        asked.append(work)
        return "chunked"

    def refuse(*args, **kwargs):
        raise AssertionError("another engine was run")

    monkeypatch.setattr(dispatch, "cheapest", chosen)
    for other in ("dense", "gram"):
        found = dataclasses.replace(dispatch.ENGINES[other], statistics=refuse)
        monkeypatch.setitem(dispatch.ENGINES, other, found)
    H, W, target = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3, 1, dtype=torch.long)
    call = {"b": None, "target": target, "pi": None, "centred": False}
    linear_statistics(H, W, **call, options=LinearSphericalOptions())
    assert asked == [Workload(3, 9, 4, 1, 0, torch.float32, "cpu")]
    with pytest.raises(AssertionError, match="another engine"):
        linear_statistics(H, W, **call, options=LinearSphericalOptions(engine="gram"))
    assert len(asked) == 1


WRONG = {
    "engine must be one of auto, dense.*got 'fast'": {"engine": "fast"},
    "row_chunk must be at least 1, got 0": {"row_chunk": 0},
    "class_chunk must be at least 1, got -1": {"class_chunk": -1},
    "row_chunk has no meaning for engine='gram', got 8": {"engine": "gram", "row_chunk": 8},
    "class_chunk has no meaning for engine='dense'": {"engine": "dense", "class_chunk": 8},
    "accumulate_dtype must be torch.float32 or torch.float64": {"accumulate_dtype": torch.float16},
}


@pytest.mark.parametrize("message", WRONG)
def test_options_that_mean_nothing(message):
    with pytest.raises(ValueError, match=message):
        LinearSphericalOptions(**WRONG[message])


def test_options_of_a_wrong_type():
    with pytest.raises(TypeError, match=r"row_chunk must be an integer, got 1\.5"):
        LinearSphericalOptions(row_chunk=1.5)
    with pytest.raises(TypeError, match="deterministic must be True or False, got 1"):
        LinearSphericalOptions(deterministic=1)
