"""Memory: a CPU's is kept, and what to do where a GPU's runs out is said in a line.

A step frees and allocates the same few hundred megabytes; by default glibc returns every large block to the kernel and each new one is
paid for in page faults, up to a third of the CPU time of a step.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from collections.abc import Iterator

import torch

from fastpoem.config import TrainConfig
from fastpoem.engine.precision import has_bf16
from fastpoem.errors import InputError, first_line

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Serve all sizes from the heap and never trim it. Returns whether the C library understood (glibc does; others have no mallopt)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1), mallopt(_M_TOP_PAD, 64 << 20)])


def held(device: torch.device) -> int:
    """Bytes that training holds now: of a GPU's memory what the allocator has taken, of a CPU's what the process has. The device is not asked."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
    return most_held(device)


def most_held(device: torch.device) -> int:
    """The most bytes that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextlib.contextmanager
def enough_memory(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Inside, a GPU whose memory runs out is an InputError: how much there is, was held and asked for, and which flags need less."""
    try:
        yield
    except RuntimeError as error:  # PyTorch's allocator has a kind of its own for it, the CUDA libraries have not
        if device.type == "cpu" or not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        if device.type == "mps":
            raise InputError(f"--batch-size {config.batch_size}", first_line(error), "use a smaller one") from None
        free, total = torch.cuda.mem_get_info(device)
        asked = re.search(r"Tried to allocate ([\d.]+ [KMGT]iB)", str(error))
        held, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
        reason = (
            f"{device} has {_gib(total)}, of which training held {_gib(held)} at the most, and asked for {asked[1] if asked else 'more'}"
            f" ({_gib(total - free - reserved)} are the driver's and other processes')"
        )
        half = "bf16" if has_bf16(device) else "fp16"
        less = ["a smaller --batch-size"] * (config.batch_size > 1)
        less += [f"--precision {half}"] * (config.precision == "fp32")
        less += ["a smaller --max-length"] + ["--vocab corpus"] * (config.vocab == "all")
        raise InputError(
            f"--batch-size {config.batch_size}", reason, f"use {', '.join(less[:-1])} or {less[-1]}"
        ) from None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
