"""The state of a run that is not finished, in one file that is whole or not there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from softsphere_lab.errors import LabError
from softsphere_lab.records.folder import write_bytes

__all__ = ["Checkpoint"]


class Checkpoint:
    """What a run was at the end of its last epoch, or some steps ago.

    path: of the file, None where nothing is to be kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def load(self) -> dict[str, Any] | None:
        """The state, with the random numbers as they were; None where a run begins.

        Raises: LabError where the file was spoiled.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            torch.set_rng_state(state["random"])
            if "random on the GPU" in state:
                torch.cuda.set_rng_state_all(state["random on the GPU"])
        except Exception as error:  # what unpickling raises is not a short list
            raise LabError(
                f"{self.path} cannot be read ({type(error).__name__}); delete it, and the run "
                "that it is of begins anew"
            ) from error
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the state."""
        if self.path is None:
            return
        state = {**state, "random": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["random on the GPU"] = torch.cuda.get_rng_state_all()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.path.parent.mkdir(exist_ok=True)
        write_bytes(self.path, buffer.getvalue())

    def remove(self) -> None:
        """Forgets the state."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
