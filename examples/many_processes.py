"""Trains a language model whose output classes are sharded over processes.

    torchrun --nproc-per-node 2 examples/many_processes.py --data FOLDER --out runs/ptb
    torchrun --nproc-per-node 3 examples/many_processes.py --data FOLDER --out runs/ptb --resume
    python examples/many_processes.py           # some seconds on a CPU
    python examples/many_processes.py --full    # 100,000 classes and a wider network

FOLDER has ptb/train.parquet and so on, as SOFTSPHERE_DATA does; reading it needs the extra [lab].
Without --data the text is generated. The trunk is replicated by DistributedDataParallel. Each
process keeps its own rows of the output layer. The batch of a step depends on the seed and the
step alone, so that a run can be resumed on another number of processes. Ctrl-C stops the run after
the current step, with a checkpoint; torchrun then adds a traceback of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

# Ctrl-C ends the program with a sentence, also during the imports below.
signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped by Ctrl-C."))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from softsphere import LinearSphericalLoss
from softsphere.parallel import keep_whole_state

# The sizes without --full and with it. An argument of its own changes each of them.
QUICK = {"classes": 5_000, "width": 64, "rows": 256, "steps": 200}
FULL = {"classes": 100_000, "width": 256, "rows": 2_048, "steps": 2_000}
# The arguments that a run must keep when it is resumed.
KEPT = ("classes", "context", "width", "rows", "rate", "seed")
SETTINGS = "settings.json"


class UseError(Exception):
    """A mistake in the arguments. The first process prints it in one line."""


class Model:
    """A network on the last words, an output layer over the ranks, and Adam for both."""

    def __init__(self, counts: Tensor, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(options.seed)
        trunk = nn.Sequential(
            nn.Embedding(len(counts), options.width),
            nn.Flatten(),
            nn.Linear(options.context * options.width, options.width),
            nn.Tanh(),
        ).to(device)
        self.trunk = DistributedDataParallel(trunk)
        self.head = LinearSphericalLoss(
            options.width,
            len(counts),
            prior=counts,
            device=device,
            process_group=dist.group.WORLD,
            averaged=True,  # DistributedDataParallel averages the gradients of the trunk
        )
        parameters = [*self.trunk.parameters(), *self.head.parameters()]
        self.adam = torch.optim.Adam(parameters, lr=options.rate)
        for x in parameters:  # the state exists before the first step, so that it can be loaded
            moments = {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
            self.adam.state[x] = {"step": torch.zeros(()), **moments}
        keep_whole_state(self.adam, self.head)

    def loss(self, words: Tensor, target: Tensor) -> Tensor:
        """The mean loss of the rows of all ranks, from those of this one."""
        value: Tensor = self.head(self.trunk(words), target)
        return value

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds. Tensors share their memory with the model."""
        trunk = self.trunk.module.state_dict()
        return {"trunk": trunk, "head": self.head.state_dict(), "adam": self.adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.trunk.module.load_state_dict(state["trunk"])
        self.head.load_state_dict(state["head"])
        self.adam.load_state_dict(state["adam"])


def save(model: Model, step: int, options: argparse.Namespace) -> None:
    """Writes the checkpoint of a step. It gets its name when it is whole."""
    part, whole = (options.out / f"{name}{step:08d}" for name in ("part-", "step-"))
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        kept = {name: getattr(options, name) for name in KEPT}
        (part / SETTINGS).write_text(json.dumps(kept))
    dist.barrier()
    dcp.save(model.state(), checkpoint_id=part)
    dist.barrier()
    if first:
        part.rename(whole)
    dist.barrier()


def load(model: Model, options: argparse.Namespace) -> int:
    """Loads the newest checkpoint into the model, on any number of ranks. Returns its step."""
    newest = checkpoints(options.out)[-1]
    try:
        kept = json.loads((newest / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise UseError(f"--resume: {newest} is not a checkpoint of this program") from error
    for name in KEPT:
        if kept.get(name) != getattr(options, name):
            raise UseError(
                f"--resume: {newest} was made with {name} {kept.get(name)}, got "
                f"{getattr(options, name)}; pass the same arguments, or another --out"
            )
    state = model.state()
    try:
        dcp.load(state, checkpoint_id=newest)
    except dcp.CheckpointException as error:
        raise UseError(
            f"--resume: {newest} cannot be read; remove it to go on from the checkpoint before it"
        ) from error
    model.load(state)
    return int(newest.name.removeprefix("step-"))


def checkpoints(folder: Path | None) -> list[Path]:
    """The whole checkpoints of a folder, the newest last."""
    return [] if folder is None else sorted(folder.glob("step-*"))


def read_text(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The words of a text as numbers, and how often each class occurs."""
    if options.data is None:
        generator = torch.Generator().manual_seed(options.seed)
        after = torch.randperm(options.classes, generator=generator)
        frequent = torch.rand(20_000, generator=generator).mul(-3).exp()  # few words are common
        drawn = (frequent * options.classes).long().clamp(max=options.classes - 1)
        follows = torch.rand(20_000, generator=generator) < 0.5
        words = torch.where(follows, after[drawn.roll(1)], drawn)
        return words, words.bincount(minlength=options.classes).clamp(min=1)
    try:
        from softsphere_lab.data import text
        from softsphere_lab.errors import LabError
    except ModuleNotFoundError as error:
        raise UseError(f"--data needs {error.name}; pip install {error.name}") from error
    try:
        found = text.load("ptb", options.data)
    except LabError as error:
        raise UseError(str(error)) from error
    options.classes = len(found.words)
    return found.train, found.counts


def batch_of(step: int, words: Tensor, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The rows of this rank in a batch, which is the same for any number of ranks."""
    generator = torch.Generator().manual_seed(options.seed + 1_000_003 * step)
    places = torch.randint(len(words) - options.context, (options.rows,), generator=generator)
    own = places[dist.get_rank() :: dist.get_world_size()]
    windows = words[own.unsqueeze(1) + torch.arange(options.context + 1)]
    return windows[:, :-1], windows[:, -1]


def train(options: argparse.Namespace, device: torch.device) -> int:
    """Trains, and returns the exit code: 130 if a signal stopped it."""
    first = dist.get_rank() == 0
    stop = torch.zeros((), device=device)
    # torchrun passes a Ctrl-C on as SIGINT or SIGTERM, sometimes after the terminal already has.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.fill_(1))
    words, counts = read_text(options)
    if options.context >= len(words):
        raise UseError(f"--context {options.context} must be less than the {len(words)} words")
    model = Model(counts, options, device)
    step = saved = load(model, options) if options.resume else 0
    if first:
        print(f"{len(counts)} classes, processes: {dist.get_world_size()}, from step {step}")
        if step >= options.steps:
            print(f"Nothing is left to do; more than --steps {options.steps} would go on.")
    while step < options.steps:
        rows, target = (x.to(device) for x in batch_of(step, words, options))
        loss = model.loss(rows, target)
        model.adam.zero_grad()
        loss.backward()
        model.adam.step()
        step += 1
        if first and step % options.print == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
        wanted = stop.clone()
        dist.all_reduce(wanted)  # all ranks stop after the same step
        stopped, last = bool(wanted), step == options.steps
        if options.out and (stopped or last or step % options.every == 0):
            save(model, step, options)
            saved = step
        if stopped:
            if first:
                kept = f"; --resume goes on from step {saved}" if options.out else ""
                print(f"Stopped after step {step}{kept}.", flush=True)
            return 130
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    what = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=Path(__file__).name, description=what)
    parser.add_argument("--full", action="store_true", help="larger sizes by default")
    parser.add_argument("--data", type=folder, help="folder with ptb/train.parquet")
    parser.add_argument("--out", type=folder, help="folder of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    for name, value in QUICK.items():
        told = f"default {value}, or {FULL[name]} with --full"
        parser.add_argument(f"--{name}", type=at_least_one, help=told)
    for name, value in {"context": 4, "every": 100, "print": 10, "timeout": 300}.items():
        told = f"default {value}"
        parser.add_argument(f"--{name}", type=at_least_one, default=value, help=told)
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--rate", type=float, default=2e-3, help="of Adam; default 0.002")
    options = parser.parse_args(arguments)
    if options.data is not None and options.classes is not None:
        parser.error("--classes has no meaning with --data, whose words are the classes")
    for name, value in (FULL if options.full else QUICK).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def at_least_one(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 2**31 - 1, got {text}")
    return int(text)


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got an empty name")
    return Path(text)


def check(options: argparse.Namespace) -> None:
    """Raises UseError for arguments that do not go together, and makes the folder --out."""
    if not 0 < options.rate < 1e6:
        raise UseError(f"--rate must be positive and less than 1e6, got {options.rate}")
    if not 0 <= options.seed < 2**31:
        raise UseError(f"--seed must be at least 0 and less than 2**31, got {options.seed}")
    if options.out is None:
        if options.resume:
            raise UseError("--resume needs --out, the folder to go on in")
        return
    if options.resume and not checkpoints(options.out):
        raise UseError(f"--resume: {options.out} has no checkpoint; leave --resume out")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UseError(f"--out {options.out} cannot be made: {error.strerror}") from error
    if not os.access(options.out, os.W_OK):
        raise UseError(f"--out {options.out} cannot be written to; take another")
    if not options.resume and checkpoints(options.out):
        raise UseError(f"{options.out} has checkpoints; pass --resume, or another --out")


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    device = torch.device("cpu")
    # each process of this machine needs a GPU of its own
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # without torchrun this process is the only one
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "nccl" if device.type == "cuda" else "gloo"
    given = {"device_id": device} if device.type == "cuda" else {}
    limit = timedelta(seconds=options.timeout)
    dist.init_process_group(backend, timeout=limit, **given, **alone)
    try:
        check(options)
        return train(options, device)
    except UseError as error:
        if dist.get_rank() == 0:
            print(f"{Path(__file__).name}: error: {error}", file=sys.stderr, flush=True)
        dist.barrier()  # torchrun ends all processes once one of them has left
        return 2
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
