"""Which form of a kernel a tensor gets: Triton on CUDA, PyTorch on the CPU, Triton on the CPU under its interpreter."""

import os

from torch import Tensor

# Triton itself reads the variable once, when a kernel is defined; a later change of it would find a kernel of the other kind.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda or INTERPRETED
