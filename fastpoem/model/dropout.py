"""What dropout draws by: a mask follows from a seed and each element's position, and from nothing else.

On a CPU every poem has a seed of its own for each dropout (`Masks`, `Poems`), a function of the step and of the poem's number in it, so that
a batch drops the same however it is cut into parts. What draws by it is C (`fastpoem.model.fused`) or PyTorch (`fastpoem.model.ops`).

Compiled code drops by `drop`. A compiler is free to draw a mask once and keep it, or to draw it again in the backward pass, in a kernel of another shape. Inductor draws
`F.dropout`'s by one form of Triton's generator in some kernels and by another in others (from PyTorch 2.13 on; pytorch #198333), and then
the gradient is that of another mask. It has a switch against it, `align_random_eager`, which older versions lack and which costs a handful
of launches a dropout; `fallback_random` gives up the fusion. Plain integer arithmetic is fused like any other, is cheaper than Triton's
generator, and gives the same bits wherever it is done.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Masks(NamedTuple):
    """Which masks a batch has on a CPU, outside a compiler: its poems are numbers `first`, `first` + 1 ... of the whole batch of a step."""

    key: int  # 64 bits (signed int64) that stand for seed and step
    first: int  # the number, in the step's whole batch, of the first poem here

    @classmethod
    def drawn(cls) -> Masks:
        """By PyTorch's generator: others every time."""
        (key,) = torch.empty(1, dtype=torch.int64, device="cpu").random_(-(2**63), None).tolist()
        return cls(key, 0)

    def seeds(self, dropouts: int, poems: int) -> Tensor:
        """(dropouts, P) int64, no two equal: SplitMix64 (Steele, Lea & Flood, 2014), a dropout's poems beginning 2^32 after those of the last."""
        dropout, poem = np.arange(dropouts, dtype=np.uint64), np.arange(self.first, self.first + poems, dtype=np.uint64)
        begin = _mixed(np.array([self.key], dtype=np.int64).view(np.uint64) + GOLDEN)  # (1,)
        seeds = _mixed(begin + GOLDEN * (2**32 * dropout[:, None] + poem))
        return torch.from_numpy(seeds.view(np.int64))


GOLDEN = 0x9E3779B97F4A7C15  # odd: with it and a mixer that can be undone, other numbers are other seeds


def _mixed(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, SplitMix64's finalizer. Products wrap. (NumPy's integers have no sign and less to do before an operation.)"""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


class Poems(NamedTuple):
    """What one dropout on a CPU draws by."""

    starts: Tensor  # (P + 1,) int32, where each poem begins in the batch's N tokens, and N
    seeds: Tensor  # (P,) int64

    @classmethod
    def of_each(cls, dropouts: int, starts: Tensor, masks: Masks | None) -> list[Poems]:
        """For each dropout of a model; masks None: where nothing is dropped."""
        poems = len(starts) - 1
        if masks is None:
            return [cls(starts, torch.zeros(poems, dtype=torch.int64, device="cpu"))] * dropouts
        return [cls(starts, seeds) for seeds in masks.seeds(dropouts, poems)]


Draw = Tensor | Poems | None  # a compiled dropout's seed (2,) int32, a CPU's poems, or PyTorch's generator


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
