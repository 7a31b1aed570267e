"""One run: a language model, an output layer and a seed; the data order is that of the seed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softsphere.parallel import keep_whole_state
from softsphere_lab.data.similarity import Pair, spearman
from softsphere_lab.data.text import Text
from softsphere_lab.errors import LabError
from softsphere_lab.models.kept_clusters import Assignments, assignment_name
from softsphere_lab.models.output_layers import Output, layer, tied_rows
from softsphere_lab.models.sharded_layers import can_be_sharded, sharded_layer
from softsphere_lab.models.text_clusters import BY
from softsphere_lab.models.text_networks import LSTM, ngram_network
from softsphere_lab.records.folder import Line
from softsphere_lab.training.capturing import obstacle_of
from softsphere_lab.training.model_over_ranks import ModelOverRanks
from softsphere_lab.training.rates import cosine
from softsphere_lab.training.run import Run
from softsphere_lab.training.text_parts import Examples, ngram_parts, perplexity, window_parts
from softsphere_lab.training.whole_model import WholeModel

__all__ = ["Data", "Epoch", "Final", "LanguageRun", "Setup"]

# A rank up to this one counts as being among the best.
TOP = 10
# AdamW moves a weight by about its rate in a step, whatever the weight's size. Embeddings of rare
# words that begin with PyTorch's standard deviation of 1 would stay the noise that they are.
EMBEDDING_STD = 0.1
# Fields of a setup that records made before them do not have. A configuration has them only where
# they are not at their default, so that those records can still be resumed.
LATER = (
    "linear_last",
    "warm_up",
    "clip",
    "beta2",
    "layers",
    "recurrent_dropout",
    "context",
    "carried",
    "optimizer",
)


@dataclass(frozen=True)
class Setup:
    """The network and the training of every loss, whose rate falls to zero along a cosine.

    n: the words of an n-gram. hidden: the width of all layers but the last; width: d, that of the
    last. length: the words of a window of the LSTM. batch_size: the words of a step. train, held:
    how many words of the training part, and of each of the others, are used; None means all.
    linear_last: whether the last layer of the n-gram model has no activation. warm_up: the share of
    the steps in which the rate rises. clip: the largest norm of all gradients together; None means
    any. optimizer: "adamw" or "sgd", both without decay, SGD without momentum; it steps all but a
    layer that has an optimizer of its own. beta2: how much of its mean of squared gradients AdamW
    keeps in a step. layers, recurrent_dropout, context: those of the LSTM. carried: whether it is
    trained on streams of text, a window of each in a batch, and carries its states from each window
    to the next one.
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
    linear_last: bool = False
    warm_up: float = 0.0
    clip: float | None = None
    beta2: float = 0.999
    layers: int = 1
    recurrent_dropout: float = 0.0
    context: int = 0
    carried: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"

    @property
    def windows(self) -> int:
        """The windows of a batch of the LSTM."""
        return max(1, self.batch_size // self.length)

    @property
    def streams(self) -> int:
        """The streams of text that the LSTM is trained on; 0 where it carries no states."""
        return self.windows if self.carried else 0

    def config(self) -> Line:
        """Returns the fields as the configuration of a record has them.

        >>> [key for key in Setup(warm_up=0.1).config() if key in LATER]
        ['warm_up']
        """
        default = {each.name: each.default for each in fields(self)}
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in LATER or value != default[key]
        }


@dataclass(frozen=True)
class Data:
    """A text, and pairs of words whose similarity people have judged.

    assignments: the clusters of the words, for output layers that have some.
    """

    text: Text
    pairs: dict[str, list[Pair]]
    assignments: Assignments = field(default_factory=dict)


@dataclass(frozen=True)
class Epoch:
    """Metrics after one pass over the text. seconds: of training alone.

    valid_nll is None for a loss without probabilities, and valid_mrr is None for all others.
    """

    epoch: int
    train_loss: float
    valid_nll: float | None
    valid_mrr: float | None
    seconds: float


@dataclass(frozen=True)
class Final:
    """The end of a run, with the weights of the epoch that was best on validation data.

    The test part is read once. mrr: the mean of 1 / rank of the word that came. simlex999,
    wordsim353: Spearman's correlation of the embeddings' cosines with people's judgement, None with
    too few pairs of known words.
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
    """A language model and its output layer under training.

    group: the processes that train it together, all of which make the same calls; None for this
    process alone.
    """

    epoch_type = Epoch

    def __init__(
        self,
        data: Text,
        output: Output,
        lr: float,
        seed: int,
        setup: Setup,
        assignments: Assignments | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.output, self.clip = output, setup.clip
        self.examples = _examples(data, output, setup)
        self.vocabulary = torch.arange(len(data.words), device=setup.device)
        self.model = _network(len(data.words), output, setup).to(setup.device)
        counts = data.counts if output.classes is None else data.cut(output.classes).counts
        assignment = (assignments or {}).get(assignment_name(output, BY))
        self.head, own = layer(output, setup.width, counts, setup.device, assignment)
        if isinstance(self.model, LSTM) and output.tied:
            self.model.tie(tied_rows(self.head, self.embeddings()))
        if group is not None and can_be_sharded(output):
            self.head, own = sharded_layer(output, self.head, counts, group)
        parameters = [*self.model.parameters(), *([] if own else self.head.parameters())]
        shared = _optimizer(parameters, lr, setup)
        self.both = WholeModel(self.model, self.head)
        if group is not None:
            keep_whole_state(shared, self.head)
            self.both = ModelOverRanks(self.model, self.head, group)
        _, y = self.examples["train"]
        rows = setup.windows if output.lstm else setup.batch_size
        steps = setup.epochs * math.ceil(len(y) / rows)
        super().__init__(
            {"model": self.model, "head": self.head},
            [shared, *([own] if own else [])],
            lambda step: cosine(step, steps, setup.warm_up),
            rows=len(y),
            batch_size=rows,
            seed=seed,
            device=y.device,
            obstacle=obstacle_of(self.head, group),
            shuffled=not (output.lstm and setup.carried),
        )

    def loss_of(self, index: Tensor, *drawn: Tensor) -> Tensor:
        x, y = self.examples["train"]
        return self.both.loss(x[index], y[index])

    def before_epoch(self) -> None:
        if isinstance(self.model, LSTM):
            self.model.begin()

    def before_step(self) -> None:
        if self.clip is not None:
            self.both.clip(self.clip)

    def weights(self) -> dict[str, Any]:
        return self.both.whole(super().weights())

    def state(self) -> dict[str, Any]:
        return self.both.whole(super().state())

    def look(self, epoch: int, train_loss: float, seconds: float) -> tuple[Epoch, float] | None:
        nll = self.nll("valid")
        if nll is None:
            mrr = self.ranking("valid")["mrr"]
            return Epoch(epoch, train_loss, None, mrr, seconds), -mrr
        if not math.isfinite(perplexity(nll)):
            return None
        return Epoch(epoch, train_loss, nll, None, seconds), nll

    def nll(self, part: str) -> float | None:
        """Returns the mean negative log-likelihood of a word, or None without probabilities."""
        if not self.output.normalised:
            return None
        return self.both.mean_loss(*self.examples[part])

    def ranking(self, part: str) -> dict[str, float]:
        """Returns how often the right word is first, how often in the first ten, and the MRR."""
        ranks = self.both.every_rank(*self.examples[part]).double()
        return {
            "top1": float((ranks == 1).double().mean()),
            "top10": float((ranks <= TOP).double().mean()),
            "mrr": float((1 / ranks).mean()),
        }

    @torch.no_grad()
    def embeddings(self) -> Tensor:
        """Returns the embeddings of all words of the input."""
        if isinstance(self.model, LSTM):
            return self.model.words(self.vocabulary)
        assert isinstance(self.model, nn.Sequential)
        embedding = self.model[0]
        assert isinstance(embedding, nn.Embedding)
        return embedding.weight.detach()

    def final(self, data: Data, read_test: bool) -> Final:
        """Returns the end of the run, with the weights of the best epoch."""
        self.put(self.kept)
        ranking = self.ranking("test") if read_test else {}
        embedding = self.embeddings().cpu()
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


def _examples(data: Text, output: Output, setup: Setup) -> Examples:
    """Inputs are of the whole vocabulary, targets of the classes of the output layer."""

    def parts(of: Text) -> Examples:
        if output.lstm:
            return window_parts(of, setup.length, setup.device, setup.context, setup.streams)
        return ngram_parts(of, setup.n, setup.device)

    read = parts(data)
    if output.classes is None:
        return read
    predicted = parts(data.cut(output.classes))
    return {name: (read[name][0], predicted[name][1]) for name in read}


def _network(vocabulary: int, output: Output, setup: Setup) -> nn.Module:
    """The layers below the output layer."""
    lacking = _obstacle_to_tying(output, setup)
    if output.tied and lacking is not None:
        raise LabError(f"{output} cannot be tied: that needs {lacking}; or leave out tied")
    model: nn.Module
    if output.lstm:
        model = LSTM(
            vocabulary,
            setup.embedding,
            setup.width,
            layers=setup.layers,
            dropout=setup.recurrent_dropout,
            context=setup.context,
            streams=setup.streams,
        )
    else:
        depth = output.depth or setup.depth
        model = ngram_network(
            vocabulary,
            setup.n - 1,
            setup.embedding,
            (setup.hidden,) * (depth - 1) + (setup.width,),
            activation=output.activation or setup.activation,
            dropout=setup.dropout,
            linear_last=setup.linear_last,
        )
    embedding = next(layer for layer in model.modules() if isinstance(layer, nn.Embedding))
    nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
    return model


def _optimizer(
    parameters: Iterable[nn.Parameter], lr: float, setup: Setup
) -> torch.optim.Optimizer:
    """Returns what steps them; it is fused, since the embeddings have most of the parameters."""
    match setup.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr=lr, fused=True)
        case "adamw":  # without decay this is Adam
            betas = (0.9, setup.beta2)
            return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=True)
    raise LabError(f'optimizer must be "adamw" or "sgd", got {setup.optimizer!r}')


def _obstacle_to_tying(output: Output, setup: Setup) -> str | None:
    """Returns what is missing for rows of the output layer that are embeddings of the network."""
    if not output.lstm:
        return "the word lstm"
    if output.classes is not None:
        return "all words as classes, without classes="
    if setup.embedding != setup.width:
        return f"embeddings of width {setup.width}, that of the output, got {setup.embedding}"
    return None
