"""The poems of a step as the host sends them: their ids in the store's own two bytes, and where each begins.

That is 2 KB for 16 poems, however they are batched; everything else (widening, shifting, masking, packing) is tensor arithmetic that
`fastpoem.engine.batch` does on the device. A corpus that fits stays there whole, and a step then sends only the places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpoem.corpus.plan import Step
from fastpoem.corpus.store import TokenStore

# What the sizes of packed batches are rounded up to, where equal sizes are worth some padding: tokens to a slot of 64, or a 32nd of the
# batch if that is more; the longest poem to a power of two, 128 at the least, which is a block of the flash kernel. Over the 217,561 poems
# that makes 51 to 66 sizes for batches of 16 to 64, and fewer for larger ones, with 3% of padding at 16 and 1% at 64.
SLOT, SLOT_LONGEST, SHARE = 64, 128, 32


class Shape(NamedTuple):
    """What the sizes of a batch's tensors depend on: batches of one shape share buffers and graphs."""

    poems: int  # B
    longest: int  # tokens of a poem, both ends counted, at most: L
    packed: int = 0  # N where the poems lie end to end in one row of N inputs; 0 where each has a row of L - 1

    def rounded(self) -> Shape:
        """The shape, of few, that a packed batch of this one is padded to. What is added is less than the longest poem may be: attention
        takes it for one more poem."""
        inputs = max(SLOT_LONGEST, 1 << (self.longest - 2).bit_length())
        slot = min(max(SLOT, (1 << self.packed.bit_length() >> 1) // SHARE), inputs)
        return Shape(self.poems, inputs + 1, -(-self.packed // slot) * slot)


class Rows(NamedTuple):
    """`source` (n,) int16 or int32 holds ids without sign (None: the resident corpus); `where` (B, 2) int64 the place there and the
    length of each poem. `tokens`: the targets, one less than its length a poem."""

    source: Tensor | None
    where: Tensor
    shape: Shape
    tokens: int


@dataclass
class Feed:
    """Turns the poems of a step into rows. batching: "bucket" and "pad" pad to the longest poem, "pack" not at all. With `rounded` there are
    few different sizes: "bucket" pads to the bucket's edge, "pack" as `Shape.rounded` says. `table`: what to send instead of each of the
    store's ids."""

    store: TokenStore
    batching: str
    rounded: bool = False
    table: np.ndarray | None = None
    _starts: np.ndarray | None = field(default=None, repr=False)  # of each bucket in the resident corpus

    def corpus(self) -> Tensor:
        """The whole corpus as one `source`, (n,) int16 or int32. From here on steps send places in it and no ids."""
        buckets = [self._signed(bucket.tokens).ravel() for bucket in self.store.buckets]
        sizes = [0, *(part.size for part in buckets)]
        self._starts = np.cumsum(sizes[:-1])
        return torch.from_numpy(np.concatenate(buckets))

    def _signed(self, ids: np.ndarray) -> np.ndarray:
        return (ids if self.table is None else self.table.take(ids)).view(f"<i{self.store.dtype.itemsize}")

    def __call__(self, step: Step) -> Rows:
        store, poems = self.store, len(step.bucket)
        where = np.empty((poems, 2), np.int64)
        where[:, 0] = np.arange(poems) * step.length
        ids = np.zeros((poems, step.length), store.dtype) if self._starts is None else None
        for bucket in set(step.bucket.tolist()):
            here = np.flatnonzero(step.bucket == bucket)
            source, rows = store.buckets[bucket], step.index[here]
            where[here, 1] = source.lengths[rows]
            if ids is not None:
                ids[here, : source.length] = source.tokens[rows]
            elif self._starts is not None:
                where[here, 0] = self._starts[bucket] + rows * source.length
        longest, tokens = int(where[:, 1].max()), int(where[:, 1].sum()) - poems
        shape = Shape(poems, step.length if self.rounded and self.batching == "bucket" else longest)
        if self.batching == "pack":
            shape = Shape(poems, longest, tokens)
            shape = shape.rounded() if self.rounded else shape
        sent = None if ids is None else torch.from_numpy(self._signed(ids).ravel())
        return Rows(sent, torch.from_numpy(where), shape, tokens)

    def packed_shapes(self, bucket: np.ndarray, index: np.ndarray, poems: int) -> list[Shape]:
        """The different rounded shapes of batches of `poems` poems each: (n,) int64 bucket and row of one after the other."""
        lengths = np.empty(len(bucket), np.int64)
        for one in np.unique(bucket).tolist():
            lengths[bucket == one] = self.store.buckets[one].lengths[index[bucket == one]]
        batches = lengths.reshape(-1, poems)
        longest, tokens = batches.max(1).tolist(), (batches.sum(1) - poems).tolist()
        return list(dict.fromkeys(Shape(poems, *size).rounded() for size in zip(longest, tokens, strict=True)))


def validation_steps(store: TokenStore, rows: np.ndarray, batch: int) -> Iterator[Step]:
    """The held-out rows of the text (sorted int64) in batches of one bucket each, whatever is left of a bucket in a smaller one."""
    bucket, index = store.locate(rows)
    for one in np.unique(bucket).tolist():
        mine = index[bucket == one]
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            yield Step(store.buckets[one].length, np.full(len(part), one), part)
