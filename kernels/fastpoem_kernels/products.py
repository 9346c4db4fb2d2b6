"""A step's matrix products: PyTorch's, but for those of bfloat16 on a CPU with AMX (tiles.c).

There oneDNN, which PyTorch calls, makes the products of a small GPT-2 at a third of the unit's rate: half of it is lost where the first
operand is transposed (every weight's gradient), and a result of 768 columns is made by one thread.
"""

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastpoem_kernels import native


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (K, N) -> (M, N), in `out` where it is given. The same bits for any number of threads where it is made on tiles."""
    if not (uses_tiles(a) and _lies_well(a) and _lies_well(b) and (out is None or out.stride(1) == 1)):
        return torch.mm(a, b, out=out)
    (m, k), n = a.shape, b.shape[1]
    if b.shape[0] != k or b.dtype != a.dtype or (out is not None and (out.shape != (m, n) or out.dtype != a.dtype)):
        raise ValueError(f"no product of {[*a.shape]} {a.dtype} and {[*b.shape]} {b.dtype}")
    c = a.new_empty(m, n) if out is None else out
    scratch = torch.empty(native.run("product_scratch", m, n, k, a.stride(1), dtype=a.dtype) + 64, dtype=torch.uint8)
    scratch = scratch[-scratch.data_ptr() % 64 :]  # tiles are read by whole cache lines
    native.run("product", a, *a.stride(), b, *b.stride(), c, c.stride(0), m, n, k, scratch)
    return c


def _lies_well(t: Tensor) -> bool:
    return t.is_cpu and t.numel() > 0 and 1 in t.stride()


def uses_tiles(t: Tensor) -> bool:
    """Are products of `t` made on AMX's tiles?"""
    real = type(t) in (Tensor, torch.nn.Parameter)
    return real and t.is_cpu and t.dtype == torch.bfloat16 and has_tiles()


@cache
def has_tiles() -> bool:
    """Has this processor AMX, may this process use it, and is the C there? Asked in this order: what is not used need not be compiled."""
    if not _has_amx() or native.why_not(torch.bfloat16) is not None:
        return False
    return native.run("has_tiles", dtype=torch.bfloat16) == 1


def _has_amx() -> bool:
    return sys.platform == "linux" and "amx_bf16" in Path("/proc/cpuinfo").read_text()
