"""All handlings, from the modules that register them."""

from __future__ import annotations

import _handlings_copies
import _handlings_frameworks
import _handlings_gradients
import _handlings_optimizers
import _handlings_weights
from _registry import HANDLINGS

__all__ = ["HANDLINGS"]
del _handlings_copies, _handlings_frameworks, _handlings_gradients
del _handlings_optimizers, _handlings_weights
