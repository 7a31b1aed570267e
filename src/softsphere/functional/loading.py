"""Modules that load their entries of a state_dict in a way of their own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

__all__ = ["Loading", "LoadsEntries"]


class Loading(NamedTuple):
    """What PyTorch passes to each module that loads a state_dict, and reads again afterwards.

    metadata: saved with the entries of the module, and with "assign_to_params_buffers".
    strict: True from PyTorch, whatever the caller asked for.
    missing_keys, unexpected_keys, error_msgs: lists that the module extends.
    """

    metadata: dict[str, Any]
    strict: bool
    missing_keys: list[str]
    unexpected_keys: list[str]
    error_msgs: list[str]

    @property
    def assigns(self) -> bool:
        """Whether the given tensors become the parameters, as with `assign=True`."""
        return bool(self.metadata.get("assign_to_params_buffers", False))


class LoadsEntries(nn.Module):
    """A module whose subclasses load a state_dict by `_load_entries`.

    `nn.Module._load_from_state_dict` takes eight arguments, which only this class names.
    """

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loading = Loading(local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._load_entries(state_dict, prefix, loading)

    def _load_entries(self, state_dict: dict[str, Any], prefix: str, loading: Loading) -> None:
        """Loads the entries of this module, without those of its children, as every module does."""
        super()._load_from_state_dict(state_dict, prefix, *loading)
