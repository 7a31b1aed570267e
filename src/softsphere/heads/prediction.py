"""Log-probabilities, best classes and ranks from hidden states, for every output layer."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from softsphere import checks, losses
from softsphere._torch import exporting, is_dtensor, transformed
from softsphere.criteria import TopK
from softsphere.functional.conventions import Conventions, mixed_precision
from softsphere.heads.computed_weights import compute_weights
from softsphere.heads.constructor_argument import ConstructorArgument
from softsphere.heads.reader import Reader
from softsphere.parallel import Agreement

__all__ = ["OutputLayer"]


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _without_autocast(method: _Method) -> _Method:
    """A prediction with the same digits inside autocast as outside."""

    @functools.wraps(method)
    def run(self: OutputLayer, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        # the method refuses what is no tensor, on all ranks of a process group together
        if not isinstance(hidden, Tensor) or not mixed_precision(hidden):
            # An exported program would keep a context even if it changes nothing.
            return method(self, hidden, *args, **kwargs)
        with torch.autocast(hidden.device.type, enabled=False):
            return method(self, hidden, *args, **kwargs)

    return cast(_Method, run)


def _without_gradient(method: _Method) -> _Method:
    """A prediction that autograd does not record."""

    @functools.wraps(method)
    def run(self: OutputLayer, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if exporting():
            return method(self, hidden.detach(), *args, **kwargs)
        with torch.no_grad():
            return method(self, hidden, *args, **kwargs)

    return cast(_Method, run)


class OutputLayer(nn.Module, ABC):
    """log_prob, topk, predict and rank of a layer that has a `Reader` of its weight.

    Scores are computed in float32 or wider, also for half-precision layers, so that classes are
    never ordered by rounded numbers. NaN scores rank last. For a loss that is a distribution, an
    infinite output has a numerator of +∞, so that it raises ValueError on a CPU; elsewhere its
    score is NaN. For softmax an output of −∞ has probability 0.
    """

    loss: losses.Loss
    reduction: str
    ignore_index: int | None

    if TYPE_CHECKING:
        # nn.Module promises Any, which hides a wrong argument from a type checker
        def __call__(
            self,
            hidden: Tensor,
            target: Tensor,
            target_values: Tensor | None = None,
            mask: Tensor | None = None,
        ) -> Tensor: ...

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(argument := getattr(type(self), name, None), ConstructorArgument):
            argument.__set__(self, value)
            return
        if name == "loss":
            value = self._usable_loss(value)
        elif name == "sparse" and name in self.__dict__:
            checks.flag(name, value)
        super().__setattr__(name, value)

    def _usable_loss(self, loss: Any) -> losses.Loss:
        """The loss that a caller assigns, or the error that it cannot be that of this layer."""
        return losses.get(loss)

    @property
    def conventions(self) -> Conventions:
        """Reduction and ignored rows, checked as the attributes are now."""
        return Conventions.checked(
            self.loss, reduction=self.reduction, ignore_index=self.ignore_index
        )

    @abstractmethod
    def _reader(self) -> Reader:
        """The weight as it is now, read once."""

    def _present_reader(self, action: str) -> Reader:
        """The reader of a prediction. An error on one rank of a process group is one on all."""
        shards: Any = getattr(self, "shards", None)
        if shards is None:
            return self._read()
        try:
            return self._read()
        except Exception:
            with Agreement(shards.ranks, action):
                raise

    def _read(self) -> Reader:
        """The reader of the present weight, since a prediction runs no hooks."""
        compute_weights(self)
        sharded = [name for name, x in self.named_parameters() if is_dtensor(x)]
        if sharded and getattr(self, "shards", None) is None:
            raise RuntimeError(
                f"{sharded[0]} is sharded by fully_shard, which gathers it for a forward, and a "
                "prediction is none; call head.unshard() before it and head.reshard() after it, or "
                "once torch.distributed.fsdp.register_fsdp_forward_method(head, 'log_prob')"
            )
        return self._reader()

    @property
    @abstractmethod
    def base_measure(self) -> Tensor | None:
        """π (D), or None for π = 1."""

    @_without_autocast
    def log_prob(
        self, hidden: Tensor, classes: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Returns log f_k of every class, or of the given ones, in float32 or wider.

        It has gradients with respect to hidden and the weight, as
        `nn.AdaptiveLogSoftmaxWithLoss.log_prob` does. Autograd then keeps some tensors of the size
        of the result; where it records nothing, the weight is read in chunks.

        Args:
            hidden: (…, d), floating-point.
            classes: (n) class indices of any integer dtype, the same for every row, or None for
                all D classes. For the target of each row call the layer in evaluation mode with
                reduction "none".
            mask: (D), boolean, True for classes that take part. A `LinearSphericalLoss` without a
                process_group takes one, as its forward does, and a `SampledSoftmaxLoss`.
                Classes that are masked out have log f_k = −∞.

        Returns (…, D) or (…, n).

        Raises TypeError for a loss that is not a distribution, ValueError or TypeError for
        arguments of a wrong shape or kind, ValueError for infinite outputs (on a CPU), and
        RuntimeError in a backward that asks for second derivatives where they do not exist.
        """
        reader = self._present_reader("log_prob")
        with reader.checked("log_prob") as checked:
            reader.check(hidden)
            reader = reader if mask is None else reader.masked(mask, hidden)
            if not self.loss.normalised:
                self.loss.log_numerator(hidden)  # raises, since there is none
            if classes is not None:
                classes = checks.classes(classes, reader.num_classes)
                checks.same_device("classes", classes, "hidden", hidden)
                if classes.dim() != 1:
                    raise ValueError(f"classes must have shape (n,), got {tuple(classes.shape)}")
            checked.found(hidden, classes=classes)
        H = reader.rows_of(hidden)
        if classes is None and _in_one_piece(reader, hidden):
            result = reader.every_log_prob(H)
            # A row with an infinite score is NaN everywhere. Its first entry is selected, since the
            # export of torch 2.6 compares the rows of a slice with its open end.
            reader.check_normaliser(H, result.detach().select(1, 0))
            return result.view(*hidden.shape[:-1], result.shape[-1])
        log_norm = reader.check_normaliser(H, reader.log_normaliser(H)).unsqueeze(1)
        if classes is not None:
            result = reader.scores_of(H, classes) - log_norm
        else:
            result = H.new_empty(H.shape[0], reader.num_classes)
            for part, scores in reader.chunks_of_scores(H):
                result[:, part] = scores - log_norm
        return result.view(*hidden.shape[:-1], result.shape[-1])

    @_without_gradient
    @_without_autocast
    def topk(
        self,
        hidden: Tensor,
        k: int,
        exclude: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> TopK:
        """Returns the k best classes of each row, best first, without a gradient.

        The values are log-probabilities, or the outputs for a loss that is not a distribution. The
        weight is read once, in chunks. NaN scores rank last.

        Args:
            hidden: (…, d), floating-point.
            k: from 1 to D.
            exclude: (…, n) class indices of any integer dtype that each row leaves out, padded with
                −1: the items that a user knows already, for example. k + n ≤ D, so that every row
                has k classes left. It changes no probability.
            mask: as in `log_prob`. The probabilities are those among the classes that take part;
                the others come last, with −∞.

        Returns `TopK` of values and indices, (…, k) each.

        Raises ValueError or TypeError for arguments of a wrong shape or kind, ValueError if
        k + n > D, and for infinite outputs as described at the class.
        """
        reader = self._present_reader("topk")
        with reader.checked("topk") as checked:
            reader.check(hidden)
            reader = reader if mask is None else reader.masked(mask, hidden)
            k = checks.number_of_best("k", k, reader.num_classes)
            if exclude is not None:
                exclude = checks.excluded(exclude, hidden.shape[:-1], reader.num_classes, k)
                checks.same_device("exclude", exclude, "hidden", hidden)
            checked.found(hidden, exclude, k=k)
        H = reader.rows_of(hidden)
        if exclude is not None:
            exclude = exclude.reshape(H.shape[0], exclude.shape[-1])
        best, index = reader.topk(H, k, exclude)
        best = best - reader.check_normaliser(H, reader.log_normaliser(H)).unsqueeze(1)
        shape = (*hidden.shape[:-1], k)
        return TopK(best.view(shape), index.view(shape))

    @_without_gradient
    @_without_autocast
    def predict(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns the best class of each row.

        Args:
            hidden: (…, d), floating-point.
            mask: as in `log_prob`.

        Returns (…), int64.

        It is not always the class of the largest output, since t(o) need not be monotone. A class
        with a NaN score is never the best one, unless all are NaN.

        Raises ValueError or TypeError for hidden states of a wrong shape or kind, and for infinite
        outputs as described at the class.
        """
        reader = self._present_reader("predict")
        with reader.checked("predict") as checked:
            reader.check(hidden)
            reader = reader if mask is None else reader.masked(mask, hidden)
            checked.found(hidden)
        _, index = reader.topk(reader.rows_of(hidden), 1)
        return index.view(hidden.shape[:-1])

    @_without_gradient
    @_without_autocast
    def rank(self, hidden: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns 1 + the number of classes with a better score than the target.

        NaN scores rank last: they are never better, and a target with one has rank D.

        Args:
            hidden: (…, d), floating-point.
            target: (…) class indices of any integer dtype, every one in [0, D).
            mask: as in `log_prob`. Every target must be one of its classes.

        Returns (…), int64.

        Raises ValueError or TypeError for arguments of a wrong shape or kind, and for infinite
        outputs as described at the class.
        """
        reader = self._present_reader("rank")
        with reader.checked("rank") as checked:
            reader.check(hidden)
            reader = reader if mask is None else reader.masked(mask, hidden)
            checks.rows_target(hidden.shape[:-1], target)
            target = checks.classes(target, reader.num_classes, "target")
            checks.same_device("target", target, "hidden", hidden)
            if mask is not None:
                checks.masked_targets(~mask[target])
            checked.found(hidden, target.unsqueeze(-1))
        return reader.rank(reader.rows_of(hidden), target.reshape(-1)).view(target.shape)


def _in_one_piece(reader: Reader, hidden: Tensor) -> bool:
    """Whether log_prob is computed from all the outputs by plain operations, for which autograd,
    the compiler and torch.func have rules."""
    return torch.compiler.is_compiling() or transformed() or reader.is_differentiated(hidden)
