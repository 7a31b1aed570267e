"""A scikit-learn classifier with a loss of softsphere, by skorch.

``pip install 'softsphere[skorch]'`` installs what this module needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    from skorch import NeuralNetClassifier
except ImportError as error:
    raise ImportError(f"this needs skorch ({error}); pip install 'softsphere[skorch]'") from error

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

    Raises TypeError in `predict_proba` for a loss that is not a distribution.

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

    def _get_predict_nonlinearity(self) -> Callable[[Tensor], Tensor]:
        criterion = getattr(self, "criterion_", None)  # none before the first fit
        if self.predict_nonlinearity != "auto" or not isinstance(
            criterion, (SphericalLoss, OutputLayer)
        ):
            given: Callable[[Tensor], Tensor] = super()._get_predict_nonlinearity()
            return given
        return lambda outputs: criterion.log_prob(outputs).exp()
