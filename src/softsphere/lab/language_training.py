"""One run: a language model, an output layer, a seed. The same data order for every layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from softsphere.lab import language
from softsphere.lab.outputs import Output, Ranks, layer
from softsphere.lab.passes import Pass
from softsphere.lab.rates import cosine
from softsphere.lab.similarity import Pair, spearman
from softsphere.lab.text import Text
from softsphere.matrix import SingularStepError

__all__ = ["Data", "Epoch", "Final", "Run", "Setup"]

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


class Run:
    """A model under training, and all that it takes to go on with it elsewhere."""

    def __init__(self, data: Text, output: Output, lr: float, seed: int, setup: Setup) -> None:
        torch.manual_seed(seed)
        self.setup, self.output = setup, output
        self.examples = examples(data, output, setup)
        self.model = network(len(data.words), output, setup).to(setup.device)
        counts = data.counts if output.classes is None else data.cut(output.classes).counts
        self.head, own = layer(output, setup.width, counts, setup.device)
        parameters = [*self.model.parameters(), *([] if own else self.head.parameters())]
        # decay is off, so that this is Adam; fused, since most of the numbers are of the embeddings
        shared = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
        self.optimizers = [shared, *([own] if own else [])]
        y = self.examples["train"][1]
        self.rows = max(1, setup.batch_size * len(y) // y.numel())
        steps = setup.epochs * math.ceil(len(y) / self.rows)
        self.rates = [
            torch.optim.lr_scheduler.LambdaLR(each, lambda step: cosine(step, steps))
            for each in self.optimizers
        ]
        self.order = torch.Generator().manual_seed(seed)
        self.under_way: Pass | None = None
        self.history: list[Epoch] = []
        self.best, self.best_epoch, self.kept = math.inf, 0, self.weights()
        self.diverged = False

    def weights(self) -> dict[str, Any]:
        """As they are now."""
        state = {"model": self.model.state_dict(), "head": self.head.state_dict()}
        return copy.deepcopy(state)

    def state(self) -> dict[str, Any]:
        """What `go_on` takes."""
        return {
            "now": {"model": self.model.state_dict(), "head": self.head.state_dict()},
            "optimizers": [each.state_dict() for each in self.optimizers],
            "rates": [each.state_dict() for each in self.rates],
            "order": self.order.get_state(),
            "under way": self.under_way and self.under_way.state(),
            "history": [asdict(epoch) for epoch in self.history],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "kept": self.kept,
        }

    def go_on(self, state: dict[str, Any]) -> None:
        """From a state."""
        self.put(state["now"])
        for optimizer, its in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its)
        for rate, its in zip(self.rates, state["rates"], strict=True):
            rate.load_state_dict(its)
        self.order.set_state(state["order"])
        if state["under way"]:
            self.under_way = Pass.again(state["under way"], self.examples["train"][1].device)
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.kept = state["kept"]

    def put(self, weights: dict[str, Any]) -> None:
        """Puts weights where they came from."""
        self.model.load_state_dict(weights["model"])
        self.head.load_state_dict(weights["head"])

    def epoch(self, after_step: Callable[[int], None]) -> None:
        """What is left of a pass over the training part, and a look at the validation part.

        A loss or a perplexity that is no finite number ends the run as diverged.
        """
        x, y = self.examples["train"]
        self.under_way = self.under_way or Pass.begin(len(y), self.order, x.device)

        def stepped(step: int) -> None:
            for rate in self.rates:
                rate.step()
            after_step(step)

        try:
            language.pass_over(
                self.under_way, self.model, self.head, self.optimizers, x, y, self.rows, stepped
            )
        except SingularStepError:
            self.diverged = True
            return
        loss, seconds = self.under_way.loss, self.under_way.seconds
        self.under_way = None
        if not math.isfinite(loss):
            self.diverged = True
            return
        nll, mrr = self.nll("valid"), None
        if nll is None:
            mrr = self.ranking("valid")["mrr"]
        elif not math.isfinite(language.perplexity(nll)):
            self.diverged = True
            return
        self.history.append(Epoch(len(self.history) + 1, loss, nll, mrr, seconds))
        badness = -mrr if mrr is not None else nll
        if badness is not None and badness < self.best:
            self.best, self.best_epoch = badness, len(self.history)
            self.kept = self.weights()

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
