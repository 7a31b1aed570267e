"""The output layer that first finds a cluster of classes, and then the class within it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere._torch import eager
from softsphere.engines.leaf_choice import LEAF_ENGINES
from softsphere.engines.row_statistics import accumulator
from softsphere.functional.conventions import Conventions, mixed_precision
from softsphere.functional.on_leaves import Leaves, leaf_losses
from softsphere.heads.affine import made_dtype
from softsphere.heads.clustered_reader import ClusteredReader, Root, root_log_prob
from softsphere.heads.clustered_state import WithGrouping
from softsphere.heads.factored_leaves import factored_leaves
from softsphere.heads.prediction import OutputLayer

__all__ = ["ClusteredLoss"]

_NAMES = ("hidden", "weight", "bias")
EAGER = (
    "what a clustered layer computes depends on the clusters of the targets, so that neither an "
    "exported program nor a compiled graph can hold it; compile the model around it"
)
# The bias of an empty cluster, which is never read.
_NO_SHARE = -100.0


class ClusteredLoss(WithGrouping, OutputLayer):
    r"""A two-level output layer and its loss in one module: exact, at a cost free of D.

    Every class is in a shortlist or in one of C clusters. The root is a softmax over the S classes
    of the shortlist and the clusters. A cluster, called a leaf, is a distribution of its own:

        p_k = softmax(W_r h + b_r)_k                                  for k in the shortlist,
        p_k = softmax(W_r h + b_r)_c · π_k t(o_k) / Σ_j∈c π_j t(o_j)   for k in the cluster c,

    with o_k = w_k · z + b_k and z = h, or z = P h with `leaf_features`. The loss is −log p_t. A row
    costs its root and, if its target is in a cluster, the classes of that cluster. With clusters of
    classes that occur in the same surroundings, as `softsphere.clusters` makes them, the model has
    about the quality of softmax over all classes.

    The parameters are `root.weight` (S + C, d) and `root.bias`, `weight` (L, d') and `bias` (L) of
    the L = D − S classes in clusters, cluster by cluster, and `project.weight` (d', d) with
    `leaf_features`. Any optimizer can step them, unless the engine is "factored".

    Args:
        in_features: d.
        num_classes: D.
        assignment: (D), the cluster 0, …, C − 1 of each class, or −1 for the shortlist, as any
            integer dtype, in whatever order the classes are. A number without classes is an empty
            cluster, which has probability 0. The buffer `assignment` holds it and never changes.
        leaf: the loss of a leaf, a name or a loss: one that is a distribution.
        leaf_features: d', the width of a projection of hidden for the leaves; None for none.
        counts: (D), positive class frequencies or counts. Within each cluster they are the base
            measure π, kept as the buffer `prior` (L) with a sum of one a class. The initial bias of
            the root is the logarithm of their shares, so that the model begins with the frequencies
            where hidden states are near 0. A class without any counts like the rarest one. None
            stands for equal counts.
        bias: whether root and leaves have a bias.
        engine: "logits" computes the outputs of each row's cluster, "gram" one Gram matrix for each
            cluster, and "auto" takes the cheaper one; see `softsphere.engines.choose_leaves`.
            "factored" keeps the weight of each cluster in factors: a row costs O(d'²), however many
            classes its cluster has. It takes spherical leaves, float32 or float64, and SGD without
            momentum. The parameter `weight` is then diag(√π) [W b] (L, d' + 1), a
            `softsphere.matrix.FactoredTensor`, and `bias` is None; state_dict() holds W and b.
        reduction, ignore_index: as in `nn.CrossEntropyLoss`.
        label_smoothing: must be 0.
        sparse: whether the gradient of `weight` is a sparse tensor of the classes whose clusters
            have rows in the batch, as in `nn.Embedding`. `torch.optim.SGD` without momentum and
            `torch.optim.SparseAdam` take it. A step then touches no other rows. The gradient of
            `bias` is dense.
        device, dtype: of the parameters.

    Shapes: hidden (…, d); target (…), class indices of any integer dtype.

    Raises ValueError or TypeError for invalid arguments. The message names the argument, the value
    received and a valid alternative.

    Source: Goodman 2001, arXiv:cs/0108006 (classes of words); Chen, Grangier & Auli 2015,
    arXiv:1512.04906 (what makes clusters good); de Brébisson & Vincent 2015, arXiv:1511.05042 (the
    losses of the leaves).

    >>> assignment = torch.arange(1000) // 10 - 1  # a shortlist of ten classes, and 99 clusters
    >>> head = ClusteredLoss(8, 1000, assignment)
    >>> head(torch.randn(4, 8), torch.tensor([1, 5, 5, 999])).backward()
    >>> torch.allclose(head.log_prob(torch.randn(4, 8)).exp().sum(1), torch.ones(4))
    True
    """

    root: nn.Linear
    project: nn.Linear | None
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        assignment: Tensor,
        *,
        leaf: str | losses.Loss = "taylor_softmax",
        leaf_features: int | None = None,
        counts: Tensor | None = None,
        bias: bool = True,
        engine: str = "auto",
        reduction: str = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checks.at_least_one("in_features", in_features)
        self.num_classes = checks.at_least_one("num_classes", num_classes)
        self.has_bias = checks.flag("bias", bias)
        made_dtype(dtype)
        self.loss = _distribution(leaf)
        width = self.in_features
        if leaf_features is not None:
            width = checks.at_least_one("leaf_features", leaf_features)
        checks.one_of("engine", engine, ("auto", *LEAF_ENGINES))
        self.engine, self.sparse = engine, checks.flag("sparse", sparse)
        _check_engine(self.loss, engine, sparse)
        self.leaf_width = width
        if checks.label_smoothing(label_smoothing):
            raise ValueError(
                "label_smoothing cannot be used with a ClusteredLoss, since it needs the outputs "
                f"of all classes, got {label_smoothing}; leave it 0, or use LinearSphericalLoss"
            )
        given = Conventions.checked(self.loss, reduction=reduction, ignore_index=ignore_index)
        self.reduction, self.ignore_index = given.reduction, given.ignore_index
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.keep_grouping(assignment, counts, torch.empty(0, **made))
        S, L = len(self._grouping.shortlist), len(self._grouping.leaves)
        self.root = nn.Linear(self.in_features, S + self.num_clusters, bias=bias, **made)
        self.project = (
            None
            if leaf_features is None
            else nn.Linear(self.in_features, width, bias=False, **made)
        )
        W, b = torch.empty(L, width, **made), torch.empty(L, **made) if bias else None
        if engine == "factored":
            W, b = factored_leaves(W, b, self._grouping.starts, self.prior), None
        self.weight = nn.Parameter(W)
        self.register_parameter("bias", None if b is None else nn.Parameter(b))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values of `nn.Linear` for the weights.

        The bias of the root is the logarithm of the shares of the counts, that of the leaves is 0.
        """
        for layer in (self.root, self.project):
            if layer is not None:
                layer.reset_parameters()
        bound = 1 / math.sqrt(self.leaf_width)
        with torch.no_grad():
            for block, reach in zip(self.leaf_blocks(), (bound, 0.0), strict=False):
                block.uniform_(-reach, reach)
            self.leaves_written()
            if self.has_bias:
                self.root.bias.copy_(self.root_shares.log().clamp_min(_NO_SHARE))

    @eager(EAGER)
    def forward(
        self,
        hidden: Tensor,
        target: Tensor,
        target_values: None = None,
        mask: None = None,
    ) -> Tensor:
        """Computes −log p of the targets, reduced over the rows.

        In evaluation mode too this is the exact negative log-probability of the targets, and costs
        what a training row costs; with reduction="none" it is that of each row.

        Args:
            hidden: (…, d), floating-point.
            target: (…), class indices of any integer dtype.
            target_values, mask: must be None.

        Returns a scalar, or (…) for reduction "none".

        Raises ValueError or TypeError for invalid arguments.
        """
        _refuse(target, target_values, mask)
        self.check_parameters()
        checks.hidden(hidden, self.in_features)
        checks.same_device("weight", self.weight, "hidden", hidden)
        checks.same_device("target", target, "hidden", hidden)
        leading = hidden.shape[:-1]
        checks.rows_target(leading, target)
        mixed = mixed_precision(hidden)
        if not mixed:
            checks.same_dtype(hidden, self.weight, self.bias, _NAMES)
        H, dtype = hidden.reshape(-1, self.in_features), accumulator(self.weight.dtype)
        conventions = Conventions.checked(
            self.loss, reduction=self.reduction, ignore_index=self.ignore_index
        )
        entries = conventions.entries(target.reshape(-1), None, self.num_classes, dtype)
        nll = self._losses(H, entries.t.squeeze(1), entries.ignored)
        rows = entries.weigh(nll)
        return conventions.finish(rows.view(leading), entries.counted, hidden)

    def _losses(self, H: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
        """−log p of the target of each row H (m, d): (m), in float32 or wider."""
        grouping = self.grouping
        dtype = accumulator(self.weight.dtype)
        cluster, place = grouping.cluster[target], grouping.place[target]
        log_p = root_log_prob(self.root(H), grouping).to(dtype)
        nll = -log_p.gather(1, grouping.root_entry(target).unsqueeze(1)).squeeze(1)
        kept = torch.where(ignored, -1, cluster)
        rows, group = grouping.group(kept, place)
        Z = H[rows] if self.project is None else self.project(H[rows])
        with torch.autocast(H.device.type, enabled=False):
            of_leaves = leaf_losses(
                self.loss if self.training else self.loss.plain,
                Z.to(dtype),
                Leaves(self.weight, self.bias, self.prior.to(dtype)),
                group,
                engine=self.engine,
                sparse=self.sparse,
            )
        return nll.index_add(0, rows, of_leaves.to(nll.dtype))

    def _reader(self) -> ClusteredReader:
        self.check_parameters()
        pi = self.prior.to(accumulator(self.weight.dtype))
        leaves = Leaves(self.weight, self.bias, pi)
        root = Root(self.root, self.project)
        return ClusteredReader(self.loss.plain, root, leaves, self.grouping, self.num_classes)

    log_prob = eager(EAGER)(OutputLayer.log_prob)
    topk = eager(EAGER)(OutputLayer.topk)
    predict = eager(EAGER)(OutputLayer.predict)
    rank = eager(EAGER)(OutputLayer.rank)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.num_classes}, shortlist={len(self._grouping.shortlist)}, "
            f"clusters={self.num_clusters}, leaf={self.loss}, bias={self.has_bias}, "
            f"engine={self.engine!r}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}"
        )


def _distribution(leaf: str | losses.Loss) -> losses.Loss:
    """Returns the loss if it is a distribution."""
    loss = losses.get(leaf)
    if not loss.normalised:
        known = [name for name, kind in losses.REGISTRY.items() if kind.normalised]
        raise TypeError(
            f"leaf must be a loss that is a distribution, got {loss}; use one of {', '.join(known)}"
        )
    return loss


def _check_engine(loss: losses.Loss, engine: str, sparse: bool) -> None:
    if engine in ("auto", "logits"):
        return
    if not isinstance(loss, losses.Normalised):
        raise TypeError(
            f"engine={engine!r} needs a spherical leaf, got leaf={loss}; "
            "use engine='logits' or 'auto'"
        )
    if sparse:
        raise ValueError(
            f"sparse must be False for engine={engine!r}, whose gradient is that of all classes; "
            "use engine='logits' or 'auto'"
        )


def _refuse(target: Any, target_values: Any, mask: Any) -> None:
    """Raises TypeError for what a clustered layer cannot do."""
    if target_values is not None:
        raise TypeError(
            "target_values cannot be used with a ClusteredLoss, which takes one class index for "
            "each row; use LinearSphericalLoss or FactoredSphericalLoss for K-sparse targets"
        )
    if mask is not None:
        raise TypeError(
            "mask cannot be used with a ClusteredLoss; use LinearSphericalLoss, whose forward "
            "takes a mask of classes"
        )
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(
            "target must hold class indices, got class probabilities, which need the logits of all "
            "classes; use LinearSphericalLoss for them"
        )
