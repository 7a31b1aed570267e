"""Handwritten digits: the loss of a classifier is replaced in one line.

python examples/digits.py           # some seconds on a CPU
python examples/digits.py --full    # five seeds and more epochs

Needs scikit-learn, which has the digits (pip install scikit-learn).
"""

from __future__ import annotations

import argparse
import signal
import sys

# Ctrl-C ends the program with a sentence, also during the imports below.
signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped by Ctrl-C."))

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from softsphere import TaylorSoftmaxLoss


def test_error(criterion: nn.Module, seed: int, epochs: int) -> float:
    """The share of the test digits that a small network trained with this criterion gets wrong."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, random_state=seed)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = criterion(model(x[rows].float()), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        logits = model(x_test.float())
    # A criterion of softsphere predicts by its own probabilities; softmax by its largest output.
    best = criterion.predict(logits) if hasattr(criterion, "predict") else logits.argmax(1)
    return (best != y_test).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="five seeds and 60 epochs")
    full = parser.parse_args().full
    for criterion in (nn.CrossEntropyLoss(), TaylorSoftmaxLoss()):
        errors = [
            test_error(criterion, seed, 60 if full else 10) for seed in range(5 if full else 1)
        ]
        mean = sum(errors) / len(errors)
        print(f"{type(criterion).__name__:20} test error {100 * mean:.2f} %")


if __name__ == "__main__":
    main()
