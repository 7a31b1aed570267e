"""Sentences are scored and re-ranked by exact log-probabilities of an output layer with clusters.

python examples/rerank.py           # some seconds on a CPU
python examples/rerank.py --full    # all of the text, a larger model

A model of the next word from the last two is trained on the documentation that comes with Python.
Then each sentence of a held-out part is ranked among copies of it in which one word is another
one. A score needs the probability of one word a row, which costs what a training row costs: no
row sees all the words. Needs nothing but softsphere.
"""

from __future__ import annotations

import argparse
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
from softsphere.clusters import by_frequency

LENGTH, CANDIDATES = 12, 10


class Trigrams(nn.Module):
    """log p of each word of a sentence after the two before it."""

    def __init__(self, width: int, counts: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(counts), width)
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh())
        assignment = by_frequency(counts).assignment
        self.head = ClusteredLoss(width, len(counts), assignment, counts=counts, reduction="none")

    def forward(self, sentences: Tensor) -> Tensor:
        before = torch.cat([sentences[..., :-2, None], sentences[..., 1:-1, None]], -1)
        hidden = self.mix(self.embedding(before).flatten(-2))
        return -self.head(hidden, sentences[..., 2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="all of the text and a larger model")
    full = parser.parse_args().full
    most, width, epochs = (10**9, 128, 10) if full else (40_000, 32, 6)

    torch.manual_seed(0)
    text = re.findall(r"[a-z]+", " ".join(topics.values()).lower())[:most]
    vocabulary = [word for word, _ in Counter(text).most_common()]
    number = {word: i for i, word in enumerate(vocabulary)}
    tokens = torch.tensor([number[word] for word in text])
    sentences = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    sentences = sentences[torch.randperm(len(sentences))]
    train, test = sentences[: len(sentences) * 9 // 10], sentences[len(sentences) * 9 // 10 :]

    model = Trigrams(width, train.flatten().bincount(minlength=len(vocabulary)).clamp_min(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(32):
            loss = -model(train[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    # The first candidate is the sentence; in the others one word was drawn from the whole text.
    candidates = test.unsqueeze(1).repeat(1, CANDIDATES, 1)
    places = torch.randint(2, LENGTH, (len(test), CANDIDATES - 1, 1))
    drawn = tokens[torch.randint(len(tokens), places.shape)]
    candidates[:, 1:].scatter_(2, places, drawn)
    with torch.no_grad():
        scores = model.eval()(candidates).sum(-1)
    first = (scores[:, 1:] <= scores[:, :1]).all(1).float().mean()
    print(f"{len(vocabulary):,} different words, {len(test):,} sentences of {LENGTH} words")
    print(f"the sentence itself is the best of {CANDIDATES} for {100 * first:.0f} % of them")
    order = scores[0].argsort(descending=True)
    for place in (order[0], order[-1]):
        sentence = " ".join(vocabulary[i] for i in candidates[0, place])
        print(f"{scores[0, place]:8.2f}  {sentence}")


if __name__ == "__main__":
    main()
