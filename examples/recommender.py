"""A recommender of items from implicit feedback: what users took says what they take next.

python examples/recommender.py           # some seconds on a CPU
python examples/recommender.py --full    # 100,000 items

Users and items are made up: each has a taste, and users take what suits them. A model sees the
items of a user without an order, and gives every item a probability. Needs nothing but softsphere.
"""

from __future__ import annotations

import argparse
import signal
import sys

# Ctrl-C ends the program with a sentence, also during the imports below.
signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped by Ctrl-C."))

import torch
from torch import Tensor, nn

from softsphere import FactoredSphericalLoss
from softsphere.optim import FactoredSGD


def made_up(users: int, items: int, taken: int, tastes: int = 8) -> Tensor:
    """The items that each user took: (users, taken), all different, popular ones more often."""
    user, item = torch.randn(users, tastes), torch.randn(items, tastes)
    popularity = -torch.arange(1.0, items + 1).log()[torch.randperm(items)]
    rows = []
    for part in user.split(512):
        noise = -torch.empty(len(part), items).exponential_().log()  # draws without replacement
        rows.append((1.5 * part @ item.T + popularity + noise).topk(taken).indices)
    return torch.cat(rows)[:, torch.randperm(taken)]


def hit_rate(best: Tensor, wanted: Tensor) -> float:
    """The share of users whose held-out item is among the best."""
    return (best == wanted.unsqueeze(1)).any(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="100,000 items and 50,000 users")
    full = parser.parse_args().full
    users, items, epochs = (50_000, 100_000, 20) if full else (2_000, 500, 30)

    torch.manual_seed(0)
    took = made_up(users, items, taken=12)
    seen, given, wanted = took[:, :8], took[:, 8:11], took[:, 11]
    counts = took[:, :11].flatten().bincount(minlength=items).float()

    width = 32
    trunk = nn.Sequential(nn.EmbeddingBag(items, width, mode="mean"), nn.Tanh())
    # The base measure is how often each item was taken, so that the weight learns tastes alone.
    head = FactoredSphericalLoss(width, items, prior=counts + 1)
    optimizer = FactoredSGD(
        [
            {"params": head.parameters(), "lr": 0.02 * items},
            {"params": trunk.parameters(), "algorithm": "adamw", "lr": 0.01},
        ]
    )
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(users).split(128):
            # Each user has three targets of equal value.
            values = torch.full((len(rows), 3), 1 / 3)
            loss = head(trunk(seen[rows]), given[rows], target_values=values)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: loss {total / users:.3f}")

    known = took[:, :11]
    with torch.no_grad():
        best = head.topk(trunk(seen), 10, exclude=known).indices
    scores = counts.expand(users, -1).scatter(1, known, -1.0) if not full else None
    if scores is not None:
        popular = scores.topk(10).indices
        print(f"the ten most popular new items have it for {100 * hit_rate(popular, wanted):.1f} %")
    print(f"the ten best new items have it for {100 * hit_rate(best, wanted):.1f} % of the users")


if __name__ == "__main__":
    main()
