"""Runs many cases in one process group of each size, since starting processes is slow."""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing as stdlib
import os
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from _devices import without_gpus

AVAILABLE = distributed.is_available() and distributed.is_gloo_available()
PRELOADED = ["torch", "softsphere", "torch.distributed.checkpoint"]
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
# With the usual eps of 1e-8, Adam divides a small gradient with its rounding by its own size.
EPS = 1e-3
Adam = partial(torch.optim.Adam, eps=EPS)


def start(work, arguments, size):
    """Calls work(rank, *arguments) in as many processes, which see no GPU, until all have ended."""
    # one process imports torch, and the ranks are forked from it
    stdlib.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with without_gpus():
        multiprocessing.start_processes(work, arguments, size, start_method="forkserver")


def run(cases, size, folder, timeout=20):
    """Runs each case on `size` ranks. Returns by name what went wrong on each rank, or None.

    Nothing is run after a case that failed on a rank, since the others may still wait for it.
    """
    with contextlib.suppress(multiprocessing.ProcessExitedException):
        start(_work, (cases, size, str(folder), timeout), size)
    found = [folder / f"{rank}.json" for rank in range(size)]
    # a rank may have been ended in its first case, when another one failed
    return [json.loads(path.read_text()) if path.exists() else {} for path in found]


def _work(rank, cases, size, folder, timeout):
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    results = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case(rank, size, folder)
            results[name] = None
        except BaseException:  # pytest's failures are no Exception
            results[name] = traceback.format_exc()
        # whole at once, since this process may be ended when another one fails
        Path(f"{folder}/{rank}.new").write_text(json.dumps(results))
        os.replace(f"{folder}/{rank}.new", f"{folder}/{rank}.json")
        if results[name] is not None:
            os._exit(1)
        distributed.barrier()
    distributed.destroy_process_group()


def rows_of(rank, counts):
    """The slice of the rows of a rank, where the ranks have these numbers of rows."""
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def world():
    return distributed.group.WORLD
