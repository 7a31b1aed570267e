"""A scikit-learn classifier with a loss of softsphere, by skorch.

``pip install skorch`` installs what this module needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

try:
    import numpy as np
    from skorch import NeuralNetClassifier
    from skorch.callbacks import EarlyStopping
    from skorch.utils import to_numpy
except ImportError as error:
    raise ImportError(f"this needs skorch ({error}); pip install skorch") from error

from softsphere.criteria import SphericalLoss, TaylorSoftmaxLoss
from softsphere.heads.prediction import OutputLayer

__all__ = ["SphericalClassifier"]


class SphericalClassifier(NeuralNetClassifier):  # type: ignore[misc, unused-ignore]
    """A `skorch.NeuralNetClassifier` whose probabilities are those of its loss.

    Args:
        module: as in skorch; it returns logits, or hidden states for an output layer.
        criterion: a criterion such as `softsphere.TaylorSoftmaxLoss`, or an output layer such as
            `softsphere.LinearSphericalLoss` with its sizes as criterion__in_features and
            criterion__num_classes, whose parameters are trained as well.
        others: as in skorch. The learning rate and optimizer must suit the output layer.

    `predict_proba` returns exp(criterion.log_prob(outputs)), whose rows sum to one, and `predict`
    the class with the largest probability. With the softmax that skorch would take, neither is
    right. Other criteria are used as skorch uses them.

    The trained weight of an output layer is part of the criterion. `save_params(f_params=…)` and
    `skorch.callbacks.Checkpoint` keep it in the file of the module, under names that begin with
    "criterion.", and `load_params` reads both from there. The file has the module's own names if
    the criterion has no parameters.

    Raises TypeError in `fit` if y has strings or other labels in place of the numbers 0 … D − 1,
    and in `predict_proba` for a loss that is not a distribution. Raises ValueError in `fit` for
    `EarlyStopping(load_best=True)` with an output layer, because that callback would bring back the
    module of the best epoch and keep the output layer of the last one.

    >>> import numpy as np, torch
    >>> X = np.random.RandomState(0).randn(60, 4).astype("float32")
    >>> net = SphericalClassifier(torch.nn.Linear, module__in_features=4, module__out_features=3,
    ...     max_epochs=2, lr=0.1, verbose=0)
    >>> net.fit(X, np.arange(60) % 3).predict_proba(X).sum(1).round(4).max()
    np.float32(1.0)
    """

    def __init__(
        self, module: Any, *args: Any, criterion: Any = TaylorSoftmaxLoss, **others: Any
    ) -> None:
        super().__init__(module, *args, criterion=criterion, **others)

    @property
    def _trains_criterion(self) -> bool:
        """Whether the criterion has parameters, which are trained with those of the module."""
        criterion = getattr(self, "criterion_", None)  # none before the first fit
        return isinstance(criterion, nn.Module) and any(True for _ in criterion.parameters())

    def _get_module(self, name: str, msg: str) -> Any:
        """Returns what skorch saves and loads under a name: for the module, the criterion too."""
        found = super()._get_module(name, msg)
        if name == "module_" and self._trains_criterion:
            return nn.ModuleDict({"module": found, "criterion": self.criterion_})
        return found

    def fit(self, X: Any, y: Any, **fit_params: Any) -> Any:
        """Trains from new parameters, as in skorch, after a look at the labels."""
        _check_class_numbers(y)  # before the parameters are drawn again
        return super().fit(X, y, **fit_params)

    def check_data(self, X: Any, y: Any) -> None:
        """Raises TypeError for labels that are no class numbers."""
        _check_class_numbers(y)
        super().check_data(X, y)

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **others: Any) -> None:
        """Raises ValueError for a callback that would restore the module alone."""
        super().on_train_begin(net, X=X, y=y, **others)
        stopping = [(name, x) for name, x in self.callbacks_ if isinstance(x, EarlyStopping)]
        for name, callback in stopping:
            if callback.load_best and self._trains_criterion:
                raise ValueError(
                    f"the callback {name!r} is EarlyStopping(load_best=True), which would restore "
                    "the module without the output layer; leave load_best out and add "
                    "skorch.callbacks.Checkpoint(load_best=True), which restores both"
                )

    def _get_predict_nonlinearity(self) -> Callable[[Tensor], Tensor]:
        criterion = getattr(self, "criterion_", None)  # none before the first fit
        criterion = getattr(criterion, "_orig_mod", criterion)  # with compile=True
        if self.predict_nonlinearity != "auto" or not isinstance(
            criterion, (SphericalLoss, OutputLayer)
        ):
            given: Callable[[Tensor], Tensor] = super()._get_predict_nonlinearity()
            return given
        kept = next((x for x in (*criterion.parameters(), *criterion.buffers())), None)

        def probabilities(outputs: Tensor) -> Tensor:
            # skorch has moved the outputs to the CPU where it predicts
            on = outputs if kept is None else outputs.to(kept.device)
            return criterion.log_prob(on).exp()

        return probabilities


def _check_class_numbers(y: Any) -> None:
    """Raises TypeError for labels that are no class numbers. A row of floats is a distribution."""
    if y is None:  # a Dataset has the labels
        return
    given = np.asarray(y if isinstance(y, list | tuple) else to_numpy(y))
    if given.dtype.kind not in "iu" and not (given.dtype.kind == "f" and given.ndim > 1):
        raise TypeError(
            f"y must have the numbers of the classes as integers from 0, got dtype {given.dtype}; "
            "sklearn.preprocessing.LabelEncoder().fit_transform(y) makes them"
        )
    if isinstance(y, list | tuple):  # skorch takes a list for several outputs
        raise TypeError(
            f"y must be an array or a tensor, got a {type(y).__name__}; pass np.array(y)"
        )
