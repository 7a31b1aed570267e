"""Output layers that own their weight and compute the loss themselves."""

from softsphere.heads.clustered import ClusteredLoss
from softsphere.heads.factored import FactoredSphericalLoss
from softsphere.heads.linear import LinearSphericalLoss
from softsphere.heads.sampled import SampledSoftmaxLoss

__all__ = ["ClusteredLoss", "FactoredSphericalLoss", "LinearSphericalLoss", "SampledSoftmaxLoss"]
