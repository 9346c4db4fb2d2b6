"""A batch from its rows, in tensor arithmetic that asks the device nothing, so that it can be captured with the rest of the step.

The last token of a poem is never an input and the first never a target, so poems of at most L tokens make (B, L - 1): Hugging Face
computes L positions and throws the last one's logits away. Padding is a target only where `pad_targets` says so; otherwise its target is
IGNORE, known from the poems' lengths and not from the pad id, which a text may spell.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpoem.corpus.feed import Shape
from fastpoem.model.attention import Packing

IGNORE = -100


class Batch(NamedTuple):
    """inputs, targets: (B, T) int64, or (1, N) where `packing` tells the poems apart."""

    inputs: Tensor
    targets: Tensor
    packing: Packing | None

    def to(self, device: torch.device) -> Batch:
        packing = self.packing and Packing(*(tensor.to(device) for tensor in self.packing))
        return Batch(self.inputs.to(device), self.targets.to(device), packing)


def assemble(source: Tensor, where: Tensor, shape: Shape, pad_id: int, pad_targets: bool = False) -> Batch:
    """source (n,) int16 or int32, where (B, 2) int64 of start and length, as in `fastpoem.corpus.feed.Rows`, all on one device. A length of 0
    is no poem, and has no target."""
    starts, lengths = where.unbind(1)  # (B,)
    if shape.packed:
        return _pack(source, starts, lengths, shape, pad_id)
    place = torch.arange(shape.longest, device=where.device)  # (L,)
    real = place < lengths[:, None]  # (B, L)
    ids = torch.where(real, _read(source, starts[:, None] + place), pad_id)  # (B, L)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()  # (B, T)
    return Batch(inputs, targets.where(lengths[:, None] > 0 if pad_targets else real[:, 1:], IGNORE), None)


def _pack(source: Tensor, starts: Tensor, lengths: Tensor, shape: Shape, pad_id: int) -> Batch:
    poems, sizes = len(starts), (lengths - 1).clamp_(min=0)  # inputs of each poem
    ends = sizes.cumsum(0)
    begins = ends - sizes
    token = torch.arange(shape.packed, device=starts.device)  # (N,)
    poem = torch.searchsorted(ends, token, right=True).clamp_(max=poems - 1)  # (N,)
    real = token < ends[-1]
    position = torch.where(real, token - begins.gather(0, poem), 0)  # (N,)
    at = starts.gather(0, poem) + position
    inputs = torch.where(real, _read(source, at), pad_id)
    targets = torch.where(real, _read(source, at + 1), IGNORE)
    place = torch.arange(shape.longest - 1, device=starts.device)  # (T,)
    unfold = torch.where(place < sizes[:, None], begins[:, None] + place, 0)  # (B, T)
    # What is left of N after the poems is one more sequence, perhaps empty: attention must write it, or its garbage reaches the gradients.
    borders = torch.cat([begins, ends[-1:], token[-1:] + 1]).int()  # (B + 2,)
    return Batch(inputs[None], targets[None], Packing(position, unfold, poem * (shape.longest - 1) + position, borders))


def _read(source: Tensor, at: Tensor) -> Tensor:
    """Ids (…) int64 at `at`, which may run over the end where the caller masks what it reads."""
    ids = source.take(at.clamp(max=len(source) - 1)).long()
    return ids & 0xFFFF if source.dtype == torch.int16 else ids
