"""Structured matrices of a large output layer: linear algebra that knows no loss."""

from softsphere.matrix.factored import FactoredMatrix, Health, SingularStepError
from softsphere.matrix.structured import StructuredGradient

__all__ = ["FactoredMatrix", "Health", "SingularStepError", "StructuredGradient"]
