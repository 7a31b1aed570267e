"""An LSTM language model of words whose output layer has clusters of words by meaning.

python examples/language_model.py           # some seconds on a CPU
python examples/language_model.py --full    # all of the text, a larger model

The text is the documentation that comes with Python. Needs scikit-learn for the clusters
(pip install scikit-learn).
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
from collections import Counter
from pydoc_data.topics import topics

# Ctrl-C ends the program with a sentence, also during the imports below.
signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped by Ctrl-C."))

import torch
from torch import Tensor, nn

from softsphere import ClusteredLoss
from softsphere.clusters import by_neighbours


def words(most: int) -> tuple[Tensor, list[str]]:
    """The text as numbers of words, and the words, the commonest first."""
    text = re.findall(r"[a-z]+|[.,:;()]", " ".join(topics.values()).lower())[:most]
    vocabulary = [word for word, _ in Counter(text).most_common()]
    number = {word: i for i, word in enumerate(vocabulary)}
    return torch.tensor([number[word] for word in text]), vocabulary


class LanguageModel(nn.Module):
    def __init__(self, width: int, head: ClusteredLoss) -> None:
        super().__init__()
        self.embedding = nn.Embedding(head.num_classes, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = head

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.lstm(self.embedding(tokens))[0]

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean −log p of each word after those before it."""
        return self.head(self.hidden(tokens[:, :-1]), tokens[:, 1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="all of the text and a larger model")
    full = parser.parse_args().full
    most, width, epochs = (10**9, 256, 8) if full else (12_000, 32, 3)

    torch.manual_seed(0)
    tokens, vocabulary = words(most)
    length = 20
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    rows = rows[torch.randperm(len(rows))]
    train, test = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]
    counts = train.flatten().bincount(minlength=len(vocabulary))
    clusters = by_neighbours(train.flatten(), counts)
    head = ClusteredLoss(width, len(vocabulary), clusters.assignment, counts=counts.clamp_min(1))
    model = LanguageModel(width, head)
    sizes = f"{len(vocabulary):,} of them different, in {head.num_clusters} clusters"
    print(f"{len(tokens):,} words, {sizes}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(train)).split(16):
            loss = model(train[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            perplexity = math.exp(model.eval()(test))
        print(f"epoch {epoch + 1}: test perplexity {perplexity:.0f}")

    best = model.head.topk(model.hidden(test[:1, :-1])[0, -1], 5)
    start = " ".join(vocabulary[i] for i in test[0, -8:-1])
    guesses = ", ".join(vocabulary[i] for i in best.indices)
    print(f"after “{start}”: {guesses}")


if __name__ == "__main__":
    main()
