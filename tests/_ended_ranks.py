"""Training in which a rank is killed, and that goes on from a checkpoint with one rank fewer."""

from __future__ import annotations

import datetime
import json
import os
import signal
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed

from _ranks import TIGHT
from softsphere import ClusteredLoss, FactoredSphericalLoss, LinearSphericalLoss
from softsphere.optim import FactoredSGD
from softsphere.parallel import keep_whole_state

d, D = 5, 23
HEADS = {
    "linear": LinearSphericalLoss,
    "clustered": partial(ClusteredLoss, assignment=torch.arange(D) % 7 - 1, leaf_features=3),
    "factored": FactoredSphericalLoss,  # the last one, in which a rank is killed
}
SAVED, ENDED, LAST = 3, 5, 8


def made(kind, group=None):
    torch.manual_seed(0)
    head = HEADS[kind](d, D, dtype=torch.float64, process_group=group)
    make = FactoredSGD if kind == "factored" else torch.optim.SGD
    optimizer = make(head.parameters(), lr=0.1, momentum=0.9)
    keep_whole_state(optimizer, head)
    return head, optimizer


def batch(step):
    generator = torch.Generator().manual_seed(step)
    H = torch.randn(12, d, generator=generator, dtype=torch.float64)
    return H, torch.randint(D, (12,), generator=generator)


def train(head, optimizer, steps, rank=0, size=1, after=lambda step: None):
    """Steps on equal parts of the same 12 rows."""
    own = slice(12 // size * rank, 12 // size * (rank + 1))
    for step in steps:
        H, t = batch(step)
        optimizer.zero_grad()
        head(H[own], t[own]).backward()
        optimizer.step()
        after(step)


def whole(head):
    """All rows of all tensors, on every rank."""
    state = head.state_dict().items()
    return {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in state}


def state_of(head, optimizer):
    packed = optimizer.state_dict()["state"]
    return {"head": head.state_dict(), "momentum": {str(k): v for k, v in packed.items()}}


def begin(rank, size, folder, name, seconds=20):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{name}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )


def until_one_is_ended(rank, size, folder):
    """Saves after some steps. The last rank is killed later, and the others say what they saw."""
    begin(rank, size, folder, "first")
    runs = {kind: made(kind, distributed.group.WORLD) for kind in HEADS}
    for kind, (head, optimizer) in runs.items():
        first = {k: x.detach().clone() for k, x in whole(head).items()}
        if rank == 0:
            torch.save(first, f"{folder}/{kind}.first")
        train(head, optimizer, range(SAVED), rank, size)
        dcp.save(state_of(head, optimizer), checkpoint_id=Path(folder) / kind)
    told = {}
    for kind, (head, optimizer) in runs.items():

        def after(step, kind=kind):
            if step == ENDED and rank == size - 1 and kind == "factored":
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            train(head, optimizer, range(SAVED, LAST), rank, size, after)
        except RuntimeError as error:
            told[kind] = str(error)
    Path(f"{folder}/told-{rank}.json").write_text(json.dumps(told))
    os._exit(0)


def resumed(rank, size, folder):
    """Goes on from the checkpoint; one process that was not disturbed takes all steps."""
    begin(rank, size, folder, "second")
    for kind in HEADS:
        head, optimizer = made(kind, distributed.group.WORLD)
        # a first step, since an optimizer has no state before it
        train(head, optimizer, range(1), rank, size)
        state = state_of(head, optimizer)
        dcp.load(state, checkpoint_id=Path(folder) / kind)
        head.load_state_dict(state["head"])
        packed = optimizer.state_dict()
        packed["state"] = {int(k): v for k, v in state["momentum"].items()}
        optimizer.load_state_dict(packed)
        train(head, optimizer, range(SAVED, LAST), rank, size)
        one, alone = made(kind)
        one.load_state_dict(torch.load(f"{folder}/{kind}.first"))
        train(one, alone, range(LAST))
        got, want = whole(head), whole(one)
        assert set(got) == set(want)
        for name, x in want.items():
            torch.testing.assert_close(got[name], x.detach(), **TIGHT)
    distributed.destroy_process_group()


def of_another_group(rank, size, folder):
    """The ranks take groups of different sizes for that of the layer."""
    begin(rank, size, folder, "groups", seconds=4)
    alone = distributed.new_group([size - 1])
    group = alone if rank == size - 1 else distributed.group.WORLD
    try:
        train(*made("linear", group), range(1), 0, 1)
        told = None
    except RuntimeError as error:
        told = str(error)
    Path(f"{folder}/told-{rank}.json").write_text(json.dumps(told))
    os._exit(0)


def of_another_size(rank, size, folder):
    """The ranks join a job of different sizes."""
    try:
        begin(rank, size + (rank == 0), folder, "sizes", seconds=4)
        train(*made("linear", distributed.group.WORLD), range(1), rank, size)
        told = None
    except RuntimeError as error:
        told = str(error)
    Path(f"{folder}/told-{rank}.json").write_text(json.dumps(told))
    os._exit(0)
