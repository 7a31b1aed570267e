"""The state of a run that is not finished, in one file that is whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from softsphere.packed_states import packed, unpacked
from softsphere.whole_files import write_bytes
from softsphere_lab.errors import LabError

__all__ = ["Checkpoint", "CheckpointOfRank"]


class Checkpoint:
    """The state of a run after its last epoch, or after a step within an epoch.

    path: the file, or None if nothing is to be kept.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def load(self) -> dict[str, Any] | None:
        """Returns the state and sets the random generators; returns None if a run begins.

        Raises LabError if the file is spoiled.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            state: dict[str, Any] = unpacked(self.path.read_bytes())
            torch.set_rng_state(state["random"])
            if "random on the GPU" in state:
                # there may be fewer devices than where it was saved
                states = state["random on the GPU"][: torch.cuda.device_count()]
                torch.cuda.set_rng_state_all(states)
        except Exception as error:  # unpickling can raise nearly anything
            raise LabError(
                f"{self.path} cannot be read ({type(error).__name__}); delete it, and its run "
                "begins again"
            ) from error
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the state."""
        if self.path is None:
            return
        state = {**state, "random": torch.get_rng_state()}
        if torch.cuda.is_initialized():  # by a run on a GPU
            state["random on the GPU"] = torch.cuda.get_rng_state_all()
        self.path.parent.mkdir(exist_ok=True)
        write_bytes(self.path, packed(state))

    def remove(self) -> None:
        """Removes the state."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class CheckpointOfRank(Checkpoint):
    """The state of a run that several processes train, which all read and the first one writes.

    Their random generators are in the same state, on the CPU and each on the GPU of its own.
    """

    def __init__(self, path: Path | None, rank: int) -> None:
        super().__init__(path)
        self.rank = rank

    def load(self) -> dict[str, Any] | None:
        state = super().load()
        if state is not None and "random on the GPU" in state:
            # that of the GPU of the first rank
            torch.cuda.set_rng_state(state["random on the GPU"][0])
        return state

    def save(self, state: dict[str, Any]) -> None:
        if self.rank == 0:
            super().save(state)
