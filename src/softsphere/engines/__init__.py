"""Engines compute (s, q, c) and pull their partials back; they never name a loss."""

from softsphere.engines.choice import Choice, choose
from softsphere.engines.leaf_choice import choose_leaves
from softsphere.engines.options import LinearSphericalOptions

__all__ = ["Choice", "LinearSphericalOptions", "choose", "choose_leaves"]
