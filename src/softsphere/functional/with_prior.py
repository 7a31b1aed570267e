"""Modules that keep a prior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softsphere import checks
from softsphere.functional.loading import Loading, LoadsEntries

__all__ = ["WithPrior"]


class WithPrior(LoadsEntries):
    """A module whose buffer `prior`, normalised to Σ π = D, is always in float32 or float64.

    A prior that is assigned is checked and normalised, as one that is given to the constructor.
    """

    prior: Tensor | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "prior" and value is not None:
            value = checks.loaded_prior(value)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WithPrior:
        before = self.prior
        if before is not None and before.dtype == torch.float64:
            try:
                fn(before.new_empty(0))
            except TypeError:  # a device without float64, such as Apple's
                self.prior = before = before.float()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.prior is not None:
            if self.prior.dtype in (torch.float16, torch.bfloat16):
                self.prior = before.to(self.prior.device)
            elif self.prior.dtype == torch.float64 != before.dtype and not self.prior.is_meta:
                # Normalised again, since the sum was rounded to float32.
                self.prior = checks.prior(self.prior)
        return self

    def _load_entries(self, state_dict: dict[str, Any], prefix: str, loading: Loading) -> None:
        """Loads as every module does, but normalises a prior that is not normalised."""
        key = f"{prefix}prior"
        if self.prior is not None and key in state_dict:
            try:
                state_dict[key] = checks.loaded_prior(state_dict[key])
            except (TypeError, ValueError) as error:
                loading.error_msgs.append(f"{key} cannot be loaded: {error}")
                return
        super()._load_entries(state_dict, prefix, loading)
