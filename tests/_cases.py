"""Every loss with its oracle. A new loss joins all tests by one line here."""

from __future__ import annotations

import _oracle as oracle
from softsphere import losses

CASES = {
    "squared_error": (losses.SquaredError(), oracle.squared_error(1.0)),
    "squared_error_unobserved": (losses.SquaredError(0.2), oracle.squared_error(0.2)),
    "spherical_softmax": (
        losses.SphericalSoftmax(eps=0.3),
        oracle.likelihood("spherical", eps=0.3),
    ),
    "taylor_softmax": (losses.TaylorSoftmax(), oracle.likelihood("taylor", order=2)),
    "z_loss": (losses.ZLoss(a=0.7, b=2.0), oracle.z_loss(0.7, 2.0)),
    "bouchard_bound": (losses.BouchardBound(), oracle.bouchard),
    "bohning_bound": (losses.BohningBound(), oracle.bohning),
    "softmax": (losses.Softmax(), oracle.likelihood("softmax")),
    "taylor_4": (losses.HigherTaylorSoftmax(4), oracle.likelihood("taylor", order=4)),
    "taylor_10": (losses.HigherTaylorSoftmax(10), oracle.likelihood("taylor", order=10)),
    "soft_margin": (losses.SoftMarginSoftmax(0.6), oracle.soft_margin(0.6, "softmax")),
    "sm_taylor_2": (
        losses.SoftMarginSoftmax(0.6, order=2),
        oracle.soft_margin(0.6, "taylor", order=2),
    ),
    "sm_taylor_6": (
        losses.SoftMarginSoftmax(0.6, order=6),
        oracle.soft_margin(0.6, "taylor", order=6),
    ),
}
