"""The learning rate of a factored weight that is given none."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from softsphere.matrix.tensors import FactoredTensor

__all__ = ["PER_CLASS", "default_rate"]

# A target moves its own row alone, and a class is the target of about one row in D. A rate that is
# proportional to D moves the rows equally far whatever D is.
PER_CLASS = 0.01
# That of `torch.optim.SGD`.
_OF_ORDINARY = 1e-3


def default_rate(params: Iterable[Tensor], momentum: float | Tensor = 0.0) -> float:
    """Returns the rate of a group, (1 − momentum) D / 100 for factored weights of D classes.

    It is that of `torch.optim.SGD`, 0.001, for a group of ordinary parameters.

    Raises ValueError for a group that needs different rates, and for a momentum of 1 or more.
    """
    given = list(params)
    classes = {p.matrix.arrays.all_rows for p in given if isinstance(p, FactoredTensor)}
    if not classes:
        return _OF_ORDINARY
    if not all(isinstance(p, FactoredTensor) for p in given):
        raise ValueError(
            "lr must be given for a group with a factored weight and ordinary parameters, since "
            f"good rates of {max(classes):,} classes are thousands of times those of the others; "
            "give the factored weight a group of its own, or give lr"
        )
    if len(classes) > 1:
        listed = ", ".join(f"{D:,}" for D in sorted(classes))
        raise ValueError(
            f"lr must be given for a group with factored weights of {listed} classes, since good "
            "rates grow with the number of classes; give lr, or each weight a group of its own"
        )
    if not float(momentum) < 1:
        raise ValueError(
            f"momentum must be below 1 for a factored weight without lr, got {float(momentum):g}; "
            "give lr"
        )
    return PER_CLASS * classes.pop() * (1 - float(momentum))
