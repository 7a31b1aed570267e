"""Softmax-like probabilities, and the losses on logits and of a linear layer, as functions."""

from softsphere.functional.on_linear import linear_spherical_loss
from softsphere.functional.on_logits import spherical_loss
from softsphere.functional.probabilities import (
    log_prob,
    log_spherical_softmax,
    log_taylor_softmax,
    spherical_softmax,
    taylor_softmax,
)

__all__ = [
    "linear_spherical_loss",
    "log_prob",
    "log_spherical_softmax",
    "log_taylor_softmax",
    "spherical_loss",
    "spherical_softmax",
    "taylor_softmax",
]
