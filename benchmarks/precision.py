"""What fastpoem computes in on each device that benchmarks run on: what `--precision auto` comes to for the full model.

That is a measurement, so it is made in one place and once in a run of the suite: contenders, in processes of their own, are told what came out.
FASTPOEM_BENCH_PRECISION (fp32, bf16 or fp16) takes its place, to try the suite on a machine that would choose another.
"""

import os
from functools import cache

import torch

from benchmarks.scene import FULL
from fastpoem.engine.precision import choose_dtype


@cache
def dtype_on(device: str) -> torch.dtype:
    """float32, bfloat16 or float16."""
    wanted = os.environ.get("FASTPOEM_BENCH_PRECISION") or "auto"
    return choose_dtype(wanted, torch.device(device), FULL, 1030)[0]
