"""Accumulated over batches in two processes, gradients are those of one process, or refused."""

from __future__ import annotations

import datetime
import re
from contextlib import nullcontext

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from _ranks import start
from softsphere import LinearSphericalLoss

pytestmark = [
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
    ),
    pytest.mark.once("gloo joins processes of the CPU"),
]

# What fully_shard needs of the streams of a CPU; torch 2.6 has none.
SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
d, D = 6, 50
RANKS, STEPS = 2, 3
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(D, d, dtype=torch.float64)
        self.trunk = nn.Sequential(nn.Linear(d, d, dtype=torch.float64), nn.Tanh())
        if tied:
            self.head = LinearSphericalLoss.from_linear(self.words)
        else:
            self.head = LinearSphericalLoss(d, D, dtype=torch.float64)

    def forward(self, words, target):
        return self.head(self.trunk(self.words(words)), target)


def train(model, wrapper, ranks, micro=3, sync="last", accumulate=True, zeros=False):
    """Gradients of every step and the last weights, by SGD on the batches of the ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=not zeros)
        with model.head.accumulate() if accumulate else nullcontext():
            for i in range(micro):
                for rank in ranks:
                    generator = torch.Generator().manual_seed(100 * step + 10 * i + rank)
                    words, target = torch.randint(D, (2, 4), generator=generator)
                    quiet = sync == "last" and i < micro - 1
                    with wrapper.no_sync() if quiet else nullcontext():
                        (wrapper(words, target) / (micro * len(ranks))).backward()
        seen += [whole(x.grad) for x in model.parameters()]
        optimizer.step()
    return seen + [whole(x) for x in model.parameters()]


def whole(x):
    """All of a tensor that may be sharded."""
    x = x.detach()
    return x.full_tensor() if hasattr(x, "full_tensor") else x.clone()


def ddp(rank, micro=3, sync="last", tied=False, zeros=False, **options):
    model = Model(tied)
    wrapper = DistributedDataParallel(model, **options)
    return train(model, wrapper, [rank], micro, sync, zeros=zeros)


def fsdp(rank, parts, accumulate):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Model(), init_device_mesh("cpu", (RANKS,))
    for part in parts:
        fully_shard(getattr(model, part) if part else model, mesh=mesh)
    return train(model, model, [rank], sync="always", accumulate=accumulate)


RIGHT = {
    "ddp": lambda rank: ddp(rank),
    "views": lambda rank: ddp(rank, gradient_as_bucket_view=True),
    "zeros": lambda rank: ddp(rank, zeros=True),
    "zeros in views": lambda rank: ddp(rank, zeros=True, gradient_as_bucket_view=True),
    "many buckets": lambda rank: ddp(rank, bucket_cap_mb=1e-4),
    "one batch": lambda rank: ddp(rank, micro=1),
    "fsdp without accumulate": lambda rank: fsdp(rank, [""], accumulate=False),
    "fsdp of the head, too, without": lambda rank: fsdp(rank, ["head", ""], accumulate=False),
}

REFUSED = {
    "synchronised at every batch": (
        lambda rank: ddp(rank, sync="always"),
        "finished reduction in the prior iteration",
    ),
    "unused": (lambda rank: ddp(rank, find_unused_parameters=True), "find_unused_parameters=False"),
    "static": (lambda rank: ddp(rank, static_graph=True), "static_graph=False"),
    "tied": (lambda rank: ddp(rank, tied=True), "has the same parameter, too"),
    "fsdp": (lambda rank: fsdp(rank, [""], accumulate=True), "as a plain tensor.*fully_shard"),
    "fsdp of the head, too": (
        lambda rank: fsdp(rank, ["head", ""], accumulate=True),
        "as a plain tensor.*fully_shard",
    ),
}


def work(rank, folder):
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    for name, case in {**RIGHT, **{name: case for name, (case, _) in REFUSED.items()}}.items():
        try:
            results[name] = case(rank)
        except Exception as error:
            results[name] = str(error)
        distributed.barrier()
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    start(work, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", RIGHT)
def test_the_gradients_and_weights_are_those_of_one_process(results, name):
    if name.startswith("fsdp") and not SHARDS_ON_CPU:
        pytest.skip("this torch shards on no CPU")
    model = Model()
    micro = 1 if name == "one batch" else 3
    want = train(model, model, range(RANKS), micro, sync="always", accumulate=False)
    for got in results:
        assert not isinstance(got[name], str), got[name]
        torch.testing.assert_close(got[name], want, **TIGHT)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(results, name):
    for got in results:
        assert isinstance(got[name], str) and re.search(REFUSED[name][1], got[name]), got[name]
