"""Handlings by frameworks that own the loop: Lightning, accelerate and the Trainer of transformers.

Each does what `by_hand` does: two batches for a step, clipping, and a schedule. A framework is
imported when its handling runs, with its warnings ignored.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _registry import Run, register
from _subject import Subject, m

__all__ = ["LOOPS", "by_hand"]

CLIP, BATCHES = 0.05, 6
VALUE = (TypeError, "clip its gradient by norm|Clip")
ADAPTIVE = (TypeError, "FactoredSGD")
Make = Callable[[Subject], torch.optim.Optimizer]
# The handlings that do what `by_hand` does, for layers that have no dense twin.
LOOPS: dict[str, tuple[str, Run]] = {}


def rate(k: int) -> float:
    return 1 / (1 + k)


def sgd(s: Subject) -> torch.optim.Optimizer:
    return s.sgd(weight_decay=0.01)


def momentum(s: Subject) -> torch.optim.Optimizer:
    return s.with_momentum()


def adam(s: Subject) -> torch.optim.Optimizer:
    return torch.optim.AdamW(s.model.parameters())


def batches(s: Subject) -> list[tuple[Tensor, Tensor]]:
    return [s.batch() for _ in range(BATCHES)]


def by_hand(s: Subject, make: Make = sgd) -> dict[str, Tensor]:
    optimizer = make(s)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for k, batch in enumerate(batches(s)):
        (s.model(*batch) / 2).backward()
        if k % 2:
            nn.utils.clip_grad_norm_(s.model.parameters(), CLIP)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
    return s.numbers()


def accelerated(s: Subject, make: Make = sgd, clip: str = "norm", resume: bool = False) -> Any:
    """With `resume`, a new model and optimizer go on from a state saved after two steps."""
    accelerate = importlib.import_module("accelerate")
    for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState):
        state._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)

    def prepared(subject: Subject) -> Any:
        optimizer = make(subject)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return accelerator.prepare(subject.model, optimizer, rates)

    model, optimizer, rates = prepared(s)
    for k, batch in enumerate(batches(s)):
        with accelerator.accumulate(model):
            accelerator.backward(model(*batch))
            if accelerator.sync_gradients:
                getattr(accelerator, f"clip_grad_{clip}_")(model.parameters(), CLIP)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        if resume and k == 3:
            with tempfile.TemporaryDirectory() as folder:
                accelerator.save_state(folder)
                accelerator.free_memory()
                s.model = Subject(s.kind, s.bias).model
                model, optimizer, rates = prepared(s)
                accelerator.load_state(folder)
    return s.numbers()


def lightning_fit(s: Subject, make: Make = sgd, clip: str = "norm", resume: bool = False) -> Any:
    """With `resume`, a new trainer and model go on from a checkpoint after the first epoch."""
    lightning = importlib.import_module("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = s.model

        def training_step(self, batch: Any, k: int) -> Tensor:
            return self.model(*batch)

        def configure_optimizers(self) -> Any:
            optimizer = make(s)
            rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            return [optimizer], [{"scheduler": rates, "interval": "step"}]

    def fitted(epochs: int, path: Path | None = None) -> Any:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            accumulate_grad_batches=2,
            gradient_clip_val=CLIP,
            gradient_clip_algorithm=clip,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Lit(), torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=path)
        return trainer

    data = batches(s)
    trainer = fitted(1)
    if resume:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "last.ckpt"
            trainer.save_checkpoint(path)
            s.model = Subject(s.kind, s.bias).model
            fitted(2, path)
    return s.numbers()


class Told(nn.Module):
    """A model as Trainer calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(x, target)}


def trainer_fit(s: Subject, make: Make = sgd, resume: bool = False) -> Any:
    """With `resume`, a new trainer and model go on from the checkpoint after two steps."""
    transformers = importlib.import_module("transformers")
    rows = [{"x": x[i], "target": t[i]} for x, t in batches(s) for i in range(m)]
    with tempfile.TemporaryDirectory() as folder:

        def fitted(checkpoint: str | None = None) -> None:
            arguments = transformers.TrainingArguments(
                folder,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                per_device_train_batch_size=m,
                gradient_accumulation_steps=2,
                max_steps=3,
                max_grad_norm=CLIP,
                save_steps=2 if resume else 99,
            )
            optimizer = make(s)
            rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            trainer = transformers.Trainer(
                Told(s.model), arguments, train_dataset=rows, optimizers=(optimizer, rates)
            )
            trainer.train(resume_from_checkpoint=checkpoint)

        fitted()
        if resume:
            s.model = Subject(s.kind, s.bias).model
            fitted(f"{folder}/checkpoint-2")
    return s.numbers()


def quiet(run: Run) -> Run:
    """The same without the warnings and progress of frameworks."""

    @functools.wraps(run)
    def quietly(s: Subject) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(s)

    return quietly


def enter(name: str, needs: str, run: Callable[..., Any], **options: Any) -> None:
    refusal = options.pop("refusal", None)
    register(name, quiet(lambda s: run(s, **options)), needs=needs, refusal=refusal)
    if not options:
        LOOPS[name] = (needs, quiet(run))


enter("accelerate", "accelerate", accelerated)
enter("accelerate with a resume", "accelerate", accelerated, make=momentum, resume=True)
enter("accelerate, Adam", "accelerate", accelerated, make=adam, refusal=ADAPTIVE)
enter("accelerate, clip_grad_value_", "accelerate", accelerated, clip="value", refusal=VALUE)
enter("Lightning", "lightning", lightning_fit)
enter("Lightning with a resume", "lightning", lightning_fit, make=momentum, resume=True)
enter("Lightning, Adam", "lightning", lightning_fit, make=adam, refusal=ADAPTIVE)
enter("Lightning, clipping by value", "lightning", lightning_fit, clip="value", refusal=VALUE)
enter("Trainer with a resume", "transformers", trainer_fit, make=momentum, resume=True)
enter("Trainer, Adam", "transformers", trainer_fit, make=adam, refusal=ADAPTIVE)
