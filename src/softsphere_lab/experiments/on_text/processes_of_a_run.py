"""Whether several processes can train a language model together with the numbers of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from softsphere_lab.errors import LabError
from softsphere_lab.models.output_layers import Output
from softsphere_lab.training.language_run import Setup

__all__ = ["check_processes"]


def check_processes(nproc: int, outputs: Sequence[Output], setup: Setup) -> None:
    """Raises LabError, which names --nproc, unless that many processes can train every output."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise LabError(f"--nproc must be 1, got {nproc}: this PyTorch has no torch.distributed")
    _check_device(nproc, setup.device)
    for output in outputs:
        reason = _alone(output, setup)
        if reason:
            raise LabError(f"--nproc must be 1, got {nproc}: {output} {reason}")
        rows = setup.windows if output.lstm else setup.batch_size
        if nproc > rows:
            raise LabError(
                f"--nproc must be at most {rows}, the rows of a batch of {output}, got {nproc}"
            )


def _check_device(nproc: int, device: str) -> None:
    if device == "cpu":
        return
    if device != "cuda":
        raise LabError(f"--device must be cpu or cuda with --nproc {nproc}, got {device}")
    found = torch.cuda.device_count()
    if nproc > found:
        raise LabError(f"--nproc must be at most {found}, the number of GPUs, got {nproc}")


def _alone(output: Output, setup: Setup) -> str:
    """Returns why one process alone can train an output; an empty string if several can."""
    if output.clusters is not None:
        return "has clusters, which are trained by one process here"
    if output.loss == "sampled_softmax":
        return "draws negatives for all rows of a batch"
    if not output.lstm and "batchnorm" in (output.activation, setup.activation):
        return "normalises over all rows of a batch"
    if output.lstm and setup.recurrent_dropout:
        return "draws dropout within an LSTM for all rows of a batch"
    if output.lstm and setup.carried:
        return "carries the states of all streams of a batch"
    if output.tied:
        return "reads words by the rows of its output layer"
    return ""
