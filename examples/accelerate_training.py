"""accelerate trains a factored layer by SGD, and the network below it by AdamW.

python examples/accelerate_training.py           # some seconds on a CPU
python examples/accelerate_training.py --full    # a million classes

A step of the factored layer costs the same for any number of classes. The program is for one
process. Needs accelerate (pip install accelerate).
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time

# Ctrl-C ends the program with a sentence, also during the imports below.
signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped by Ctrl-C."))

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from softsphere import FactoredSphericalLoss
from softsphere.optim import FactoredSGD


class Model(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))
        self.head = FactoredSphericalLoss(64, num_classes)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x), target)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="a million classes")
    num_classes = 1_000_000 if parser.parse_args().full else 10_000

    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = Model(num_classes)
    # The commonest 100 classes are what the inputs tell: one a direction.
    target = torch.randint(100, (20_000,))
    points = torch.randn(100, 16)
    data = TensorDataset(points[target] + 0.3 * torch.randn(len(target), 16), target)
    optimizer = FactoredSGD(
        [
            {"params": model.head.parameters(), "lr": 0.01 * num_classes},
            {"params": model.trunk.parameters(), "algorithm": "adamw", "lr": 1e-3},
        ]
    )
    loader = DataLoader(data, batch_size=128, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(2):
        begun, total = time.perf_counter(), 0.0
        for x, target in loader:
            with accelerator.accumulate(model):
                loss = model(x, target)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
        each = 1000 * (time.perf_counter() - begun) / len(loader)
        print(f"epoch {epoch + 1}: loss {total / len(loader):.2f}, {each:.1f} ms a batch")
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)  # weights and optimizer, in files that load_state reads
        accelerator.load_state(folder)
    head = accelerator.unwrap_model(model).head
    health = head.health()
    print(f"the factors amplify rounding errors {health.condition:.2f} times; mended above 4")


if __name__ == "__main__":
    main()
