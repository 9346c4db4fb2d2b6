"""Batches as tensors: the rows a step asks for, gathered from the store's memory maps.

The last token of a poem is never an input and the first never a target, so a batch of poems of length L is (B, L - 1): Hugging Face
computes L positions and throws the last one's logits away. Padding is a target only where `pad_targets` says so; otherwise its target is
IGNORE, known from the poems' real lengths and not from the pad id, which a text may spell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpoem.corpus.plan import Step
from fastpoem.corpus.store import TokenStore
from fastpoem.model.attention import Packing, pack_index

IGNORE = -100


class Batch(NamedTuple):
    """inputs, targets: (B, T) int64, or (1, N) where `packing` tells the poems apart. tokens: targets that are no padding."""

    inputs: Tensor
    targets: Tensor
    packing: Packing | None
    poems: int
    tokens: int

    def to(self, device: torch.device) -> Batch:
        packing = self.packing and self.packing._replace(
            positions=self.packing.positions.to(device),
            unfold=self.packing.unfold.to(device),
            fold=self.packing.fold.to(device),
        )
        return self._replace(inputs=self.inputs.to(device), targets=self.targets.to(device), packing=packing)


@dataclass(frozen=True)
class Feed:
    """Turns the poems of a step into a batch. batching: "bucket" pads to the bucket's edge, "pad" to the longest poem, "pack" not at all."""

    store: TokenStore
    batching: str
    pad_targets: bool = False

    def __call__(self, step: Step) -> Batch:
        store, poems = self.store, len(step.bucket)
        lengths = np.empty(poems, np.int64)  # (B,)
        ids = np.full((poems, step.length), store.pad_id, np.int64)  # (B, L)
        for bucket in set(step.bucket.tolist()):
            here = np.flatnonzero(step.bucket == bucket)
            source, rows = store.buckets[bucket], step.index[here]
            lengths[here] = source.lengths[rows]
            ids[here, : source.length] = source.tokens[rows]
        longest = step.length if self.batching == "bucket" else int(lengths.max())
        real = np.arange(1, longest) < lengths[:, None]  # (B, T): is the target real
        inputs, targets = ids[:, : longest - 1], ids[:, 1:longest]  # (B, T)
        tokens = int(real.sum())
        if self.batching == "pack":
            positions, unfold, fold = pack_index((lengths - 1).tolist())
            packing = Packing(positions, unfold, fold, poems)
            inputs, targets = inputs[real][None], targets[real][None]  # (1, N)
            return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), packing, poems, tokens)
        if not self.pad_targets:
            targets = np.where(real, targets, IGNORE)
        return Batch(
            torch.from_numpy(np.ascontiguousarray(inputs)),
            torch.from_numpy(np.ascontiguousarray(targets)),
            None,
            poems,
            tokens,
        )


def validation_steps(store: TokenStore, rows: np.ndarray, batch: int) -> Iterator[Step]:
    """The held-out rows of the text (sorted int64) in batches of one bucket each, whatever is left of a bucket in a smaller one."""
    bucket, index = store.locate(rows)
    for one in np.unique(bucket).tolist():
        mine = index[bucket == one]
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            yield Step(store.buckets[one].length, np.full(len(part), one), part)
