"""Prediction from hidden states by a layer that has W, read in row chunks."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere.criteria import TopK
from softsphere.engines import stream
from softsphere.functional.conventions import mixed_precision

__all__ = ["OutputLayer"]


Method = TypeVar("Method", bound=Callable[..., Any])


def exactly(method: Method) -> Method:
    """A prediction with the same digits inside autocast as outside."""

    @functools.wraps(method)
    def run(self: OutputLayer, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.check_tie()
        checks.hidden(hidden, self.in_features)
        if not mixed_precision(hidden):
            # not a context that changes nothing: an exported program would keep it
            return method(self, hidden, *args, **kwargs)
        with torch.autocast(hidden.device.type, enabled=False):
            return method(self, hidden, *args, **kwargs)

    return cast(Method, run)


def without_gradient(method: Method) -> Method:
    """A prediction that autograd does not record."""

    @functools.wraps(method)
    def run(self: OutputLayer, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if stream.exporting():
            return method(self, hidden.detach(), *args, **kwargs)
        with torch.no_grad():
            return method(self, hidden, *args, **kwargs)

    return cast(Method, run)


class OutputLayer(nn.Module, ABC):
    """log_prob, topk, predict and rank of a layer that says how its W is read.

    Rows have w numbers: d, or d + 1 where a bias is one more column of W whose input is 1.
    """

    loss: losses.Loss
    in_features: int
    num_classes: int

    @property
    @abstractmethod
    def base_measure(self) -> Tensor | None:
        """π (D), or None for one everywhere."""

    @abstractmethod
    def rows_of(self, hidden: Tensor) -> Tensor:
        """hidden as (m, w) in the dtype of what is computed with it."""

    @abstractmethod
    def weight_rows(self, classes: Tensor) -> Tensor:
        """W of the given classes (n): (n, w)."""

    @abstractmethod
    def weight_chunks(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """(slice of classes, W there) over all classes, `size` rows at a time."""

    @abstractmethod
    def outputs(self, H: Tensor, classes: Tensor | None = None) -> Tensor:
        """H Wᵀ (m, D), or (m, n) of the given classes (n), with gradients by H and the weight."""

    @abstractmethod
    def log_normaliser(self, H: Tensor) -> Tensor:
        """log Σ_k π_k t(o_k) of each row: (m); 0 for a loss without it."""

    @abstractmethod
    def is_differentiated(self, hidden: Tensor) -> bool:
        """Whether autograd records what is computed of hidden and the weight."""

    def check_tie(self) -> None:
        """Warns where the parameters are no longer shared with the layer they came from."""

    def classes(self) -> stream.Classes:
        """What prediction streams over."""
        return stream.Classes(
            self.weight_chunks, self.outputs, self.num_classes, self.base_measure, self.loss
        )

    @exactly
    def log_prob(self, hidden: Tensor, classes: Tensor | None = None) -> Tensor:
        """log f_k: (…, D), or (…, n) of the given classes (n) alone; float32 or wider.

        It has the gradients of the criterion on logits, with respect to hidden and the weight, as
        `nn.AdaptiveLogSoftmaxWithLoss.log_prob` has them. Autograd then keeps some tensors of the
        size of the result; where it records nothing W is read in chunks.

        Raises: TypeError for a loss that is not a distribution; RuntimeError in a backward that
        asks for second derivatives where there are none.
        """
        if not self.loss.normalised:
            self.loss.log_numerator(hidden)  # says so
        H, every = self.rows_of(hidden), self.classes()
        if classes is not None:
            check_classes(classes, self.num_classes)
            pi = self.base_measure
            scores = every.scores(self.outputs(H, classes), None if pi is None else pi[classes])
            result = scores - self.log_normaliser(H).unsqueeze(1)
        elif self.in_one_piece(hidden):
            result = torch.log_softmax(every.every_score(H), -1)
        else:
            log_norm = self.log_normaliser(H).unsqueeze(1)
            result = H.new_empty(H.shape[0], self.num_classes)
            for part, scores in every.stream(H):
                result[:, part] = scores - log_norm
        return result.view(*hidden.shape[:-1], result.shape[-1])

    def in_one_piece(self, hidden: Tensor) -> bool:
        """Whether log_prob is made of all the outputs by plain operations, which autograd, the
        compiler and torch.func know."""
        return (
            torch.compiler.is_compiling() or stream.transformed() or self.is_differentiated(hidden)
        )

    @without_gradient
    @exactly
    def topk(self, hidden: Tensor, k: int) -> TopK:
        """The k best classes of each row, best first; values are log-probabilities, or the outputs
        where the loss is not a distribution. W is read once, in chunks."""
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be from 1 to num_classes = {self.num_classes}, got {k}")
        H = self.rows_of(hidden)
        best, index = stream.topk(self.classes(), H, k)
        best = best - self.log_normaliser(H).unsqueeze(1)
        shape = (*hidden.shape[:-1], k)
        return TopK(best.view(shape), index.view(shape))

    @without_gradient
    @exactly
    def predict(self, hidden: Tensor) -> Tensor:
        """The best class of each row: (…)."""
        _, index = stream.topk(self.classes(), self.rows_of(hidden), 1)
        return index.view(hidden.shape[:-1])

    @without_gradient
    @exactly
    def rank(self, hidden: Tensor, target: Tensor) -> Tensor:
        """1 + the number of classes that are better than the target: (…)."""
        checks.rows_target(hidden.shape[:-1], target)
        checks.classes(target, self.num_classes, "target")
        H, t, pi = self.rows_of(hidden), target.reshape(-1), self.base_measure
        o = (H * self.weight_rows(t)).sum(-1)
        own = self.classes().scores(o, None if pi is None else pi[t])
        return stream.rank(self.classes(), H, t, own).view(target.shape)


def check_classes(classes: Tensor, num_classes: int) -> None:
    """Class indices (n)."""
    checks.classes(classes, num_classes)
    if classes.dim() != 1:
        raise ValueError(f"classes must have shape (n,), got {tuple(classes.shape)}")
