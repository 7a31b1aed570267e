"""One run: a language model, an output layer, a seed. The same data order for every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from softsphere_lab.data.similarity import Pair, spearman
from softsphere_lab.data.text import Text
from softsphere_lab.models.output_layers import Output, Ranks, layer
from softsphere_lab.training import language
from softsphere_lab.training.rates import cosine
from softsphere_lab.training.run import Run

__all__ = ["Data", "Epoch", "Final", "LanguageRun", "Setup"]

# Where a word's rank is among the ten best.
TOP = 10
# AdamW moves a weight by about its rate a step, whatever its size: from a spread of 1, which is
# PyTorch's, the embeddings of rare words would stay the noise that they began with.
EMBEDDING_STD = 0.1


@dataclass(frozen=True)
class Setup:
    """Network and training of every loss: AdamW, its rate falling to zero along a cosine.

    n: words of an n-gram; hidden: width of all its layers but the last; width: d, of the last.
    length: words of a window of the LSTM. batch_size: words in a step. train, held: words of the
    training part, and of each of the others, that are used; None for all.
    """

    n: int = 5
    embedding: int = 128
    hidden: int = 256
    width: int = 128
    depth: int = 2
    activation: str = "relu"
    length: int = 32
    dropout: float = 0.1
    batch_size: int = 512
    epochs: int = 3
    train: int | None = None
    held: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Data:
    """A text and pairs of words that people have compared."""

    text: Text
    pairs: dict[str, list[Pair]]


@dataclass(frozen=True)
class Epoch:
    """Metrics after one pass; valid_nll None without probabilities, and then valid_mrr is not.

    seconds: of training alone.
    """

    epoch: int
    train_loss: float
    valid_nll: float | None
    valid_mrr: float | None
    seconds: float


@dataclass(frozen=True)
class Final:
    """What a run ends with: the test part, read once, at the epoch best on validation data.

    mrr: mean of 1 / rank of the word that came. simlex999, wordsim353: Spearman's correlation of
    the embeddings' cosines with people's judgement; None with too few pairs of known words.
    """

    engine: str
    best_epoch: int
    valid_nll: float | None
    valid_mrr: float
    test_nll: float | None
    test_top1: float | None
    test_top10: float | None
    test_mrr: float | None
    simlex999: float | None
    simlex999_pairs: int
    wordsim353: float | None
    wordsim353_pairs: int
    seconds: float
    diverged: bool


class LanguageRun(Run[Epoch]):
    """A language model and its output layer under training."""

    epoch_type = Epoch

    def __init__(self, data: Text, output: Output, lr: float, seed: int, setup: Setup) -> None:
        torch.manual_seed(seed)
        self.output = output
        self.examples = examples(data, output, setup)
        self.model = network(len(data.words), output, setup).to(setup.device)
        counts = data.counts if output.classes is None else data.cut(output.classes).counts
        self.head, own = layer(output, setup.width, counts, setup.device)
        parameters = [*self.model.parameters(), *([] if own else self.head.parameters())]
        # decay is off, so that this is Adam; fused, since most of the numbers are of the embeddings
        shared = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
        _, y = self.examples["train"]
        rows = max(1, setup.batch_size * len(y) // y.numel())
        steps = setup.epochs * math.ceil(len(y) / rows)
        super().__init__(
            {"model": self.model, "head": self.head},
            [shared, *([own] if own else [])],
            lambda step: cosine(step, steps),
            rows=len(y),
            batch_size=rows,
            seed=seed,
            device=y.device,
        )

    def loss_of(self, index: Tensor) -> Tensor:
        x, y = self.examples["train"]
        loss: Tensor = self.head(self.model(x[index]), y[index])
        return loss

    def look(self, epoch: int, train_loss: float, seconds: float) -> tuple[Epoch, float] | None:
        nll = self.nll("valid")
        if nll is None:
            mrr = self.ranking("valid")["mrr"]
            return Epoch(epoch, train_loss, None, mrr, seconds), -mrr
        if not math.isfinite(language.perplexity(nll)):
            return None
        return Epoch(epoch, train_loss, nll, None, seconds), nll

    def nll(self, part: str) -> float | None:
        """Mean negative log-likelihood of a word, None for what is not a distribution."""
        if not self.output.normalised:
            return None
        return language.mean_loss(self.model, self.head, *self.examples[part])

    def ranking(self, part: str) -> dict[str, float]:
        """How far up the words that came are: shares of first and first ten, mean of 1 / rank."""
        self.model.eval()
        x, y = self.examples[part]
        size = max(1, 1024 * len(y) // y.numel())
        rank = cast(Ranks, self.head).rank
        with torch.no_grad():
            pairs = zip(torch.split(x, size), torch.split(y, size), strict=True)
            ranks = torch.cat([rank(self.model(some), target).flatten() for some, target in pairs])
        ranks = ranks.double()
        return {
            "top1": float((ranks == 1).double().mean()),
            "top10": float((ranks <= TOP).double().mean()),
            "mrr": float((1 / ranks).mean()),
        }

    def final(self, data: Data, read_test: bool) -> Final:
        """The end, with the weights of the best epoch."""
        self.put(self.kept)
        ranking = self.ranking("test") if read_test else {}
        embedding = embedding_of(self.model).weight.detach().cpu()
        alike = {
            name: spearman(data.text.words, embedding, data.pairs.get(name, []))
            for name in ("simlex999", "wordsim353")
        }
        nll, mrr = self.nll("valid"), self.ranking("valid")["mrr"]
        return Final(
            engine=self.output.engine,
            best_epoch=self.best_epoch,
            valid_nll=nll,
            valid_mrr=mrr,
            test_nll=self.nll("test") if read_test else None,
            test_top1=ranking.get("top1"),
            test_top10=ranking.get("top10"),
            test_mrr=ranking.get("mrr"),
            simlex999=alike["simlex999"].correlation,
            simlex999_pairs=alike["simlex999"].covered,
            wordsim353=alike["wordsim353"].correlation,
            wordsim353_pairs=alike["wordsim353"].covered,
            seconds=sum(epoch.seconds for epoch in self.history),
            diverged=self.diverged,
        )


def examples(data: Text, output: Output, setup: Setup) -> language.Examples:
    """What the network reads is of the whole vocabulary; what it tells is of the classes."""

    def parts(of: Text) -> language.Examples:
        if output.lstm:
            return language.window_parts(of, setup.length, setup.device)
        return language.ngram_parts(of, setup.n, setup.device)

    read = parts(data)
    if output.classes is None:
        return read
    told = parts(data.cut(output.classes))
    return {name: (read[name][0], told[name][1]) for name in read}


def network(vocabulary: int, output: Output, setup: Setup) -> nn.Module:
    """The layers below the output layer."""
    model: nn.Module
    if output.lstm:
        model = language.LSTM(vocabulary, setup.embedding, setup.width)
    else:
        depth = output.depth or setup.depth
        model = language.mlp(
            vocabulary,
            setup.n - 1,
            setup.embedding,
            (setup.hidden,) * (depth - 1) + (setup.width,),
            activation=output.activation or setup.activation,
            dropout=setup.dropout,
        )
    nn.init.normal_(embedding_of(model).weight, std=EMBEDDING_STD)
    return model


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The embedding of the words that a model reads."""
    return next(layer for layer in model.modules() if isinstance(layer, nn.Embedding))
