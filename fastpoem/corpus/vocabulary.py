"""Which ids a corpus uses, and their numbers when only those are kept."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastpoem.corpus.store import SLICE_BYTES, TokenStore

ROUND = 64  # matrices of whole vectors: the ids kept are made a multiple of this with some that do not occur


def kept_ids(store: TokenStore, special: Iterable[int], vocabulary: int, *others: TokenStore) -> tuple[np.ndarray, int]:
    """Ascending int64 ids below `vocabulary`: those in the store (held-out poems too, or their loss would be infinite) and in `others`, the
    `special` ones, and the lowest of the rest that fill up to a multiple of ROUND. Also how many there are without these."""
    seen = np.zeros(vocabulary, bool)
    seen[[*special]] = True
    for bucket in (bucket for one in (store, *others) for bucket in one.buckets):
        rows = max(1, SLICE_BYTES // (bucket.length * store.dtype.itemsize))
        for begin in range(0, bucket.rows, rows):
            seen[bucket.tokens[begin : begin + rows]] = True
    occurring = int(seen.sum())
    seen[np.flatnonzero(~seen)[: -occurring % ROUND]] = True
    return np.flatnonzero(seen), occurring


def numbering(ids: np.ndarray, store: TokenStore) -> np.ndarray:
    """(vocabulary of the tokenizer,) of the store's dtype: the place of each id among `ids`, 0 for one that is not kept."""
    table = np.zeros(store.vocab_size, store.dtype)
    known = ids[ids < store.vocab_size]
    table[known] = np.arange(len(known))
    return table
