"""Structured matrices of a large output layer: linear algebra that knows no loss.

The way is one: `rows` and `generations` are what V is kept in, `arrays` all that is kept of a
matrix, `step` what a step does to it, `upkeep` what keeps it fit, `factored` the matrix, `tensors`
and `table` what PyTorch sees of it; `guard` asks PyTorch's optimizers before they step.
"""

from softsphere.matrix import guard as _guard
from softsphere.matrix import table as _table
from softsphere.matrix.factored_matrix import Health
from softsphere.matrix.step import SingularStepError
from softsphere.matrix.tensors import FactoredTensor, StructuredGradient

__all__ = ["FactoredTensor", "Health", "SingularStepError", "StructuredGradient"]
del _guard, _table
