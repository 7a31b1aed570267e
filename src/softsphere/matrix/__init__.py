"""Structured matrices of a large output layer: linear algebra that knows no loss.

The modules build on one another. `rows` and `generations` keep the large array V, `arrays` holds
everything that is kept of a matrix, `gradient` and `gradient_products` describe its gradients,
`step` computes a step, `wear`, `mending` and `upkeep` keep the factors fit, and `factored_matrix`
is the matrix itself. `tensors` and `table` make it a tensor that PyTorch's tools can handle, and
`guard` asks PyTorch's optimizers before they step.
"""

from softsphere.matrix import guard as _guard
from softsphere.matrix import table as _table
from softsphere.matrix.gradient_tensors import StructuredGradient
from softsphere.matrix.tensors import FactoredTensor
from softsphere.matrix.update import SingularStepError
from softsphere.matrix.wear import Health

__all__ = ["FactoredTensor", "Health", "SingularStepError", "StructuredGradient"]
del _guard, _table
