"""Softmax-like probabilities, and the losses on logits and on a linear layer, as functions."""

from softsphere.functional.conventions import REDUCTIONS, reduce
from softsphere.functional.linear import linear_spherical_loss, loss_on_linear
from softsphere.functional.logits import (
    log_prob,
    log_prob_checked,
    log_spherical_softmax,
    log_taylor_softmax,
    loss_on_logits,
    spherical_loss,
    spherical_softmax,
    taylor,
    taylor_softmax,
)

__all__ = [
    "REDUCTIONS",
    "linear_spherical_loss",
    "log_prob",
    "log_prob_checked",
    "log_spherical_softmax",
    "log_taylor_softmax",
    "loss_on_linear",
    "loss_on_logits",
    "reduce",
    "spherical_loss",
    "spherical_softmax",
    "taylor",
    "taylor_softmax",
]
