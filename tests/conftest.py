"""Without a GPU Triton interprets its kernels: to be known before any module imports them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
