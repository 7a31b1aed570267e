"""PyTorch's own test cases, where the installed PyTorch has them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import settings


def torchs_own(name: str) -> ModuleType:
    """A module of PyTorch's tests, without what importing it does to others in this process:
    hypothesis would try a tenth of its examples, and torch.backends take no more settings."""
    profile = settings.get_current_profile_name()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        try:
            return pytest.importorskip(f"torch.testing._internal.{name}", exc_type=ImportError)
        finally:
            settings.load_profile(profile)
