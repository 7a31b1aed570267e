"""Steps of a factored matrix that are recorded once, as in a CUDA graph, and run many times.

A record knows memory alone, and Python is not called when it runs. So everything that Python does
between steps is done here: W gets a new edition, the factors are mended when it is time, and a step
that was left unfinished on the device is finished before anything reads W.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from softsphere.matrix.blocks import Blocks
from softsphere.matrix.factored_matrix import FactoredMatrix
from softsphere.matrix.gradient import GradientFactors
from softsphere.matrix.interrupts import uninterrupted
from softsphere.matrix.precision import float32_is_exact, in_full_precision

__all__ = ["Replay"]


class Replay:
    """What has to be done around the recorded steps of a matrix."""

    def __init__(self, matrix: FactoredMatrix) -> None:
        self.matrix = matrix

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside it, a step is recorded rather than taken: nothing is measured or mended.

        Copies of what a step changes are forgotten, so that the record makes them. All that were
        made meanwhile are forgotten afterwards, since they have no values until the record is run.
        """
        W, watch = self.matrix.arrays, self.matrix.watch
        W.know_sums()
        W.settle()  # or the record would do it each time
        W.changed()
        W.let_last()
        W.round_again()
        watch.recording, self.matrix.recorded_step = True, None
        try:
            yield
        finally:
            watch.recording = W.is_recorded = False
            W.rounded.forget_all()

    @in_full_precision
    def before(self) -> tuple[Any, ...]:
        """Prepares W for a recorded step.

        Returns what a record holds for ever: if it differs from that of the recording, the step
        has to be recorded again.
        """
        W, watch = self.matrix.arrays, self.matrix.watch
        W.begin_change()
        W.know_sums()
        W.settle()
        small = (W.U, W.U_inv, W.omega, W.centred_gram, W.colsum)
        maps = (W.generations.made, W.generations.maps)
        known = (watch.refused, watch.undone, watch.deviation)
        held = (*W.V.blocks, *small, *W.round_again(), *maps, *known)
        memory = [None if x is None else x.data_ptr() for x in held]
        return *memory, watch.products, W.generations.now, len(maps[1]), float32_is_exact()

    @in_full_precision
    def after(self, gradient: GradientFactors, blocks: Blocks) -> None:
        """Notes that a recorded step was run, and mends the factors when it is time.

        gradient, blocks: those of the step, in the memory of the record until it is run again.

        Raises SingularStepError if a step since the last measurement was refused.
        """
        W = self.matrix.arrays
        with uninterrupted():
            W.V.note()
            W.renamed()
            W.changed()
            W.rounded.fresh |= W.rounded.lasting
        self.matrix.after_step(gradient, blocks)
