"""One run of a recommender: a network over the items that users like, an output layer and a seed.

In each epoch, every user's items are parted at random: the network reads some of them, and the
output layer learns to predict the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from softsphere.criteria import TopK
from softsphere.losses import Spherical, SquaredError
from softsphere_lab.data.interactions import Interactions, ItemLists
from softsphere_lab.models.item_networks import ItemAverage, item_embedding, lists_padded
from softsphere_lab.models.output_layers import Output, layer, tied_rows
from softsphere_lab.training.capturing import ITEMS
from softsphere_lab.training.rates import cosine
from softsphere_lab.training.run import Run

__all__ = ["CUTOFF", "Epoch", "Final", "RecommendRun", "Setup", "recall_and_ndcg"]

# How many items are recommended.
CUTOFF = 20
# How many users are evaluated at a time.
USERS = 256


class Recommends(Protocol):
    """What an output layer can do besides computing the loss."""

    def topk(self, hidden: Tensor, k: int, exclude: Tensor | None = None) -> TopK: ...


@dataclass(frozen=True)
class Setup:
    """The network and the training of every output layer: AdamW, its rate falling along a cosine.

    width: d. length: of the hidden states. longest: the largest norm of a row of the output weight;
    after each step of AdamW longer rows are cut to it, as by `max_norm` of nn.Embedding. With
    hidden states of one length this bounds the outputs, so that rare items cannot fit the few users
    who have them exactly. read: the share of a user's items that the network reads, while the
    others are predicted. batch_size: the users of a step.
    """

    width: int = 256
    length: float = 10.0
    longest: float = 1.0
    dropout: float = 0.3
    read: float = 0.5
    batch_size: int = 256
    epochs: int = 12
    device: str = "cpu"


@dataclass(frozen=True)
class Epoch:
    """Metrics after one pass over the users. seconds: of training alone."""

    epoch: int
    train_loss: float
    seconds: float


@dataclass(frozen=True)
class Final:
    """The end of a run, with the weights of its last epoch.

    The metrics of the validation part are None if the run is trained on it as well.
    """

    engine: str
    best_epoch: int
    valid_recall: float | None
    valid_ndcg: float | None
    test_recall: float | None
    test_ndcg: float | None
    seconds: float
    diverged: bool


class RecommendRun(Run[Epoch]):
    """A recommender under training.

    joined: whether it is trained on the validation part as well.
    """

    epoch_type = Epoch

    def __init__(
        self,
        data: Interactions,
        output: Output,
        lr: float,
        seed: int,
        setup: Setup,
        *,
        joined: bool = False,
        assignment: Tensor | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.output, self.setup, self.joined = output, setup, joined
        self.data = data.joined() if joined else data
        self.known = self.data.train.to(setup.device)
        embedding = item_embedding(data.num_items, setup.width).to(setup.device)
        counts = self.data.counts
        self.head, own = layer(output, setup.width, counts, setup.device, assignment)
        read = tied_rows(self.head, embedding.weight) if output.tied else embedding
        self.model = ItemAverage(read, setup.length, setup.dropout)
        stepped = [self.model] if own else [self.model, self.head]
        parameters = nn.ModuleList(stepped).parameters()
        shared = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
        if not own:
            shared.register_step_post_hook(lambda *_: self.shorten_rows())
        users = len(self.known.lengths)
        steps = setup.epochs * math.ceil(users / setup.batch_size)
        super().__init__(
            {"model": self.model, "head": self.head},
            [shared, *([own] if own else [])],
            lambda step: cosine(step, steps),
            rows=users,
            batch_size=setup.batch_size,
            seed=seed,
            device=torch.device(setup.device),
            obstacle=ITEMS,
        )

    def loss_of(self, index: Tensor, *drawn: Tensor) -> Tensor:
        """Returns the loss of some users, for each of the items that are predicted.

        The spherical losses are computed for each item by itself. Softmax computes the outputs of a
        user once for all items, and the squared error is that of a user's whole vector.
        """
        place, items = self.known.of_users(index)
        read = torch.rand(len(items), device=items.device) < self.setup.read
        lengths = torch.bincount(place[read], minlength=len(index))
        hidden = self.model(items[read], lengths)
        place, items = place[~read], items[~read]
        if not _takes_vectors(self.output):
            each: Tensor = self.head(hidden[place], items)
            return each
        target = lists_padded(place, items, len(index))
        whole: Tensor = self.head(hidden, target, target_values=(target >= 0).to(hidden.dtype))
        return whole * len(index) / max(1, len(items))

    @torch.no_grad()
    def shorten_rows(self) -> None:
        """Cuts the rows of the output weights that are longer than they may be."""
        for parameter in self.head.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.renorm(2, 0, self.setup.longest))

    def look(self, epoch: int, train_loss: float, seconds: float) -> tuple[Epoch, float] | None:
        """Looks at nothing before the end, since all items of all users take long to rank.

        The rate has fallen to zero by then, so that no earlier epoch is better but by chance.
        """
        return Epoch(epoch, train_loss, seconds), -epoch

    @torch.no_grad()
    def quality(self, wanted: ItemLists) -> tuple[float, float]:
        """Returns Recall@20 and NDCG@20 of the items that are not known, as means over the users.

        Users without wanted items do not count.
        """
        self.model.eval()
        self.head.eval()
        users = (wanted.lengths > 0).nonzero().squeeze(1).to(self.known.items.device)
        total = torch.zeros(2, dtype=torch.float64)
        for some in users.split(USERS):
            place, items = self.known.of_users(some)
            hidden = self.model(items, self.known.lengths[some])
            exclude = lists_padded(place, items, len(some))
            best = cast(Recommends, self.head).topk(hidden, CUTOFF, exclude=exclude).indices
            total += recall_and_ndcg(best.cpu(), *wanted.of_users(some.cpu())).sum(0)
        recall, ndcg = (total / len(users)).tolist()
        return recall, ndcg

    def final(self, read_test: bool) -> Final:
        """Returns the end of the run."""
        self.put(self.kept)
        valid = (None, None) if self.joined else self.quality(self.data.valid)
        test = self.quality(self.data.test) if read_test else (None, None)
        return Final(
            engine=self.output.engine,
            best_epoch=self.best_epoch,
            valid_recall=valid[0],
            valid_ndcg=valid[1],
            test_recall=test[0],
            test_ndcg=test[1],
            seconds=sum(epoch.seconds for epoch in self.history),
            diverged=self.diverged,
        )


def _takes_vectors(output: Output) -> bool:
    """Whether a loss is computed of all items of a user together."""
    if output.spec is None or output.clusters is not None:
        return False
    loss = output.spec.loss()
    return isinstance(loss, SquaredError) or not isinstance(loss, Spherical)


def recall_and_ndcg(best: Tensor, place: Tensor, wanted: Tensor) -> Tensor:
    """Returns recall and normalised discounted gain of recommendations (m, k): (m, 2), float64.

    Recall is the share of the wanted items that are recommended. The gain of a wanted item in place
    i = 1, 2, … is 1 / log2(i + 1), and the sum is divided by the largest possible one.

    place: (N) the row that each wanted item belongs to.

    >>> recall_and_ndcg(torch.tensor([[3, 5, 4]]), torch.tensor([0, 0]), torch.tensor([5, 9]))
    tensor([[0.5000, 0.3869]], dtype=torch.float64)
    """
    m, k = best.shape
    items = 1 + int(torch.cat([best.flatten(), wanted]).max())
    hits = torch.isin(best + items * torch.arange(m).unsqueeze(1), wanted + items * place).double()
    number = torch.bincount(place, minlength=m).clamp_min(1)
    gain = 1 / torch.arange(2, k + 2, dtype=torch.float64).log2()
    largest = gain.cumsum(0)[number.clamp_max(k) - 1]
    return torch.stack([hits.sum(1) / number, (hits @ gain) / largest], 1)
