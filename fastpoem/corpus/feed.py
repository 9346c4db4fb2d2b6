"""The poems of a step as the host sends them: their ids in the store's own two bytes, and where each begins.

That is 2 KB for 16 poems, however they are batched; everything else (widening, shifting, masking, packing) is tensor arithmetic that
`fastpoem.engine.batch` does on the device. A corpus that fits stays there whole, and a step then sends only the places.

A step may be done in parts, one after another or by several processes: shares of its poems in their order, as equal as can be. All have the
sizes of the largest, and the longest poem of the step, so that a poem is computed in the same way in any part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """A step's poems, or those of one of its parts: `source` (n,) int16 or int32 holds ids without sign (None: the resident corpus);
    `where` (B, 2) int64 the place there and the length of each poem, 0 where a part has fewer than others. `tokens`: the targets, one less
    than its length a poem."""

    source: Tensor | None
    where: Tensor
    shape: Shape
    tokens: int
    first: int = 0  # the first poem's number in its step
    step: tuple[int, int] | None = None  # targets and poems of the whole step; None: these are they

    def share(self, pad_targets: bool) -> float:
        """What part of the step's targets these have. pad_targets: padding counts."""
        if self.step is None:
            return 1.0
        targets, poems = self.step
        return int((self.where[:, 1] > 0).sum()) / poems if pad_targets else self.tokens / max(1, targets)


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

    def __call__(self, step: Step, part: int = 0, parts: int = 1) -> Rows:
        """The poems of a step, or of part number `part` of `parts`."""
        store, lengths = self.store, self._lengths(step.bucket, step.index)
        here = share(len(lengths), part, parts)
        poems, mine = size_of_share(len(lengths), parts), here.stop - here.start
        where = np.zeros((poems, 2), np.int64)
        where[:, 0] = np.arange(poems) * step.length
        where[:mine, 1] = lengths[here]
        buckets, index = step.bucket[here], step.index[here]
        ids = np.zeros((poems, step.length), store.dtype) if self._starts is None else None
        for bucket in set(buckets.tolist()):
            those = np.flatnonzero(buckets == bucket)
            source, rows = store.buckets[bucket], index[those]
            if ids is not None:
                ids[those, : source.length] = source.tokens[rows]
            elif self._starts is not None:
                where[those, 0] = self._starts[bucket] + rows * source.length
        longest, tokens = int(lengths.max()), int(lengths[here].sum()) - mine
        shape = Shape(poems, step.length if self.rounded and self.batching == "bucket" else longest)
        if self.batching == "pack":
            shape = Shape(poems, longest, max(1, tokens))  # 0 would mean that nothing is packed
            shape = shape.rounded() if self.rounded else shape
        sent = None if ids is None else torch.from_numpy(self._signed(ids).ravel())
        whole = None if parts == 1 else (int(lengths.sum()) - len(lengths), len(lengths))
        return Rows(sent, torch.from_numpy(where), shape, tokens, here.start, whole)

    def _lengths(self, bucket: np.ndarray, index: np.ndarray) -> np.ndarray:
        """(n,) int64 of the poems at these rows of these buckets, both (n,) int64."""
        lengths = np.empty(len(bucket), np.int64)
        for one in np.unique(bucket).tolist():
            lengths[bucket == one] = self.store.buckets[one].lengths[index[bucket == one]]
        return lengths

    def packed_shapes(
        self, bucket: np.ndarray, index: np.ndarray, batch: int, mine: Iterable[int] = (0,), parts: int = 1
    ) -> list[Shape]:
        """The different rounded shapes of steps of `batch` poems, of the parts `mine` of each: (n,) int64 bucket and row of one poem after the
        other."""
        batches, poems = self._lengths(bucket, index).reshape(-1, batch), size_of_share(batch, parts)
        sizes: dict[tuple[int, int], None] = {}
        for here in (share(batch, part, parts) for part in mine):
            tokens = batches[:, here].sum(1) - (here.stop - here.start)
            sizes |= dict.fromkeys(zip(batches.max(1).tolist(), tokens.tolist(), strict=True))
        return list(dict.fromkeys(Shape(poems, *size).rounded() for size in sizes))


def share(poems: int, part: int, parts: int) -> slice:
    """Which of a step's poems are in one of its parts: at least one where there are as many poems as parts."""
    return slice(part * poems // parts, (part + 1) * poems // parts)


def size_of_share(poems: int, parts: int) -> int:
    """Poems of the largest part."""
    return -(-poems // parts)


def validation_steps(store: TokenStore, rows: np.ndarray, batch: int) -> Iterator[Step]:
    """The held-out rows of the text (sorted int64) in batches of one bucket each, whatever is left of a bucket in a smaller one."""
    bucket, index = store.locate(rows)
    for one in np.unique(bucket).tolist():
        mine = index[bucket == one]
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            yield Step(store.buckets[one].length, np.full(len(part), one), part)
