"""Dropout whose mask is a function of a seed and of each element's position, and of nothing else: what compiled code drops by.

A compiler is free to draw a mask once and keep it, or to draw it again in the backward pass, in a kernel of another shape. Inductor draws
`F.dropout`'s by one form of Triton's generator in some kernels and by another in others (from PyTorch 2.13 on; pytorch #198333), and then
the gradient is that of another mask. It has a switch against it, `align_random_eager`, which older versions lack and which costs a handful
of launches a dropout; `fallback_random` gives up the fusion. Plain integer arithmetic is fused like any other, is cheaper than Triton's
generator, and gives the same bits wherever it is done.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """(count, 2) int32 from PyTorch's generator on `device`: 64 bits for each dropout of a step, in one launch."""
    return torch.randint(-(2**31), 2**31 - 1, (count, 2), dtype=torch.int32, device=device)


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x, any shape and floating dtype, each element 0 with probability p (to the nearest 2^-32) and else divided by 1 - p. seed (2,) int32."""
    dropped = min(round(p * 2**32), 2**32 - 1)
    position = torch.arange(x.numel(), device=x.device).to(torch.int32).view(x.shape)  # wraps past 2^32 elements
    kept = hashed(position, seed) >= dropped - 2**31
    return kept * x * (2**32 / (2**32 - dropped))


def hashed(position: Tensor, seed: Tensor) -> Tensor:
    """position int32, seed (2,) int32 -> int32 of position's shape, uniform in its upper bits: a 32-bit hash, once for each word of the seed.

    The hash is Wellons' "lowbias32" (2018), of the least bias known for two multiplications, without its last step, which changes the lower
    bits alone. Products wrap."""
    h = position
    for word in seed:
        h = h ^ word
        h = (h ^ _shifted(h, 16)) * 0x7FEB352D
        h = (h ^ _shifted(h, 15)) * (0x846CA68B - 2**32)
    return h


def _shifted(h: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: int32 has a sign, and its own shift brings that in."""
    return (h >> bits) & (2 ** (32 - bits) - 1)
