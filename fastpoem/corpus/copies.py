"""Which rows of a store are the same poem: the same ids, whatever the texts looked like before they were cut or their characters unknown.

A 64-bit hash of each row is summed up by NumPy a slice at a time, so that no corpus is too large, and where it says "equal" the ids are
compared. Poems of one length lie in one bucket, and so do all copies of a poem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fastpoem.corpus.plan import key_of, mix
from fastpoem.corpus.store import SLICE_BYTES, Bucket, TokenStore


def copies_of(store: TokenStore, rows: np.ndarray) -> list[np.ndarray]:
    """For each of `rows` (n,) of the text: the sorted rows, itself among them, that hold the same ids."""
    which, place = store.locate(rows)
    found = [np.empty(0, np.int64)] * len(rows)
    for number in np.unique(which).tolist():
        bucket, mine = store.buckets[number], np.flatnonzero(which == number)
        wanted = _hash(store, bucket, place[mine])
        places, hashes = _with_hash(store, bucket, np.unique(wanted))
        text = store.rows_at(number, places)
        for one, value in zip(mine.tolist(), wanted, strict=True):
            like = np.flatnonzero(hashes == value)
            found[one] = text[like[_equal(bucket, places[like], np.full(len(like), place[one]))]]
    return found


def repeats(store: TokenStore) -> np.ndarray:
    """The sorted rows of the text, int64, that repeat an earlier one. Holds 8 bytes for each row of the largest bucket."""
    found = [np.empty(0, np.int64)]
    for number, bucket in enumerate(store.buckets):
        hashes = np.concatenate([np.empty(0, np.uint64), *(values for _, values in _hashes(store, bucket))])
        order = np.argsort(hashes, kind="stable")  # earlier rows first among equals
        hashes = hashes[order]
        again = np.zeros(len(order), bool)
        again[1:] = hashes[1:] == hashes[:-1]
        first = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))[again]  # of the rows with that hash
        later, first = order[again], order[first]
        found.append(store.rows_at(number, np.sort(later[_equal(bucket, later, first)])))
    return np.sort(np.concatenate(found))


def how_many_in(store: TokenStore, other: TokenStore, rows: np.ndarray) -> int:
    """How many of `rows` (n,) of `other` stand in `store` too, by their hashes."""
    which, place = other.locate(rows)
    numbers = np.unique(which).tolist()
    parts = [_hash(other, other.buckets[number], place[which == number]) for number in numbers]
    wanted = np.sort(np.concatenate([np.empty(0, np.uint64), *parts]))
    distinct = np.unique(wanted)
    seen = np.zeros(len(wanted), bool)
    for bucket in store.buckets if len(wanted) else ():
        for _, values in _hashes(store, bucket):
            # "sort": the table that NumPy 2.0 would choose overflows with 64 bits.
            seen |= np.isin(wanted, values[_among(values, distinct)], kind="sort")
    return int(seen.sum())


def _with_hash(store: TokenStore, bucket: Bucket, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places in a bucket, ascending int64; their hashes) of the rows whose hash is among the sorted `wanted`."""
    places, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for begin, values in _hashes(store, bucket):
        here = np.flatnonzero(_among(values, wanted))
        places.append(begin + here)
        hashes.append(values[here])
    return np.concatenate(places), np.concatenate(hashes)


def _among(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which of `values` are among the sorted `wanted`, of which there is at least one."""
    return wanted[np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)] == values


def _equal(bucket: Bucket, some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the rows at the places `some` (n,) and `others` (n,) are the same."""
    same = np.empty(len(some), bool)
    for part in _slices(len(some), bucket):
        one, other = bucket.tokens[some[part]], bucket.tokens[others[part]]
        same[part] = (one == other).all(axis=1) & (bucket.lengths[some[part]] == bucket.lengths[others[part]])
    return same


def _hashes(store: TokenStore, bucket: Bucket) -> Iterator[tuple[int, np.ndarray]]:
    """(first place, (n,) uint64 hashes), slice by slice of a bucket."""
    for part in _slices(bucket.rows, bucket):
        yield part.start, _hash(store, bucket, part)


def _hash(store: TokenStore, bucket: Bucket, places: np.ndarray | slice) -> np.ndarray:
    """(n,) uint64 of the rows at `places`: their ids times a key for each place in the poem. What is padding does not count, so a poem
    has the same hash in every store."""
    keys = mix(np.arange(1, bucket.length + 1, dtype=np.uint64) * np.uint64(key_of(1)))
    padding = np.concatenate([np.cumsum(keys[::-1])[::-1], np.zeros(1, np.uint64)]) * np.uint64(store.pad_id)
    lengths = bucket.lengths[places]
    return mix(bucket.tokens[places].astype(np.uint64) @ keys - padding[lengths] + lengths)


def _slices(rows: int, bucket: Bucket) -> Sequence[slice]:
    step = max(1, SLICE_BYTES // (8 * bucket.length))  # 8: of a uint64
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
