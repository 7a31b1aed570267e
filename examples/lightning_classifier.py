"""Lightning trains a classifier of many classes, with clipping, accumulation and a resume.

python examples/lightning_classifier.py           # some seconds on a CPU
python examples/lightning_classifier.py --full    # 200,000 classes

Each class is a point, and the data are points near those of their classes. Needs Lightning
(pip install lightning).
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

# Ctrl-C ends the program with a sentence, also during the imports below.
signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped by Ctrl-C."))

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from softsphere import LinearSphericalLoss


class Classifier(lightning.LightningModule):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64))
        self.head = LinearSphericalLoss(64, num_classes)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, target = batch
        return self.head(self.trunk(x), target)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, target = batch
        hidden = self.trunk(x)
        top = self.head.topk(hidden, 5).indices
        self.log("loss", self.head(hidden, target))
        self.log("top5", (top == target.unsqueeze(1)).any(1).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="200,000 classes")
    full = parser.parse_args().full
    width, num_classes, rows = (32, 200_000, 1_000_000) if full else (16, 500, 10_000)

    lightning.seed_everything(0)
    points = torch.randn(num_classes, width)
    target = torch.randint(num_classes, (rows,))
    data = TensorDataset(points[target] + 0.3 * torch.randn(rows, width), target)
    train, test = torch.utils.data.random_split(data, [0.9, 0.1])
    loaders = DataLoader(train, 256, shuffle=True), DataLoader(test, 256)

    def trainer(epochs: int) -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    model = Classifier(width, num_classes)
    first = trainer(3)
    first.fit(model, *loaders)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.ckpt"
        first.save_checkpoint(path)
        again = trainer(6)
        again.fit(Classifier(width, num_classes), *loaders, ckpt_path=path)
    for name, part in (("3 epochs", first), ("6 epochs, resumed after 3", again)):
        found = {key: value.item() for key, value in part.callback_metrics.items()}
        print(f"{name}: loss {found['loss']:.2f}, among the best five {100 * found['top5']:.0f} %")


if __name__ == "__main__":
    main()
