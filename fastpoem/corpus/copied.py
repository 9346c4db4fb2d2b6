"""How much of a text stands in a corpus word for word: the longest run of ids that both have.

Runs of four are looked up by their hash. Only where one is found is it followed further, so a corpus of 14 million ids is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastpoem.corpus.plan import mix
from fastpoem.corpus.store import SLICE_BYTES, TokenStore

SHORTEST = 4  # ids: three in a row stand in some poem nearly always


def longest_copied(store: TokenStore, texts: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) int64: of each text (its ids without the tokens round a poem) the longest run that stands in one poem of `store`; 0 for one
    shorter than SHORTEST."""
    found: np.ndarray = np.zeros(len(texts), np.int64)
    widest = max((len(text) for text in texts), default=0)
    if widest < SHORTEST:
        return found
    ids: np.ndarray = np.full((len(texts), widest + 1), -1, np.int64)  # -1 ends a run
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    runs = _runs(ids[:, :-1].astype(np.uint64))  # (n, w - 3)
    owner, place = np.nonzero(np.arange(runs.shape[1]) + SHORTEST <= np.array([len(text) for text in texts])[:, None])
    by_hash = np.argsort(runs[owner, place], kind="stable")
    owner, place = owner[by_hash], place[by_hash]
    hashes = runs[owner, place]
    for bucket in store.buckets:
        step = max(1, SLICE_BYTES // (8 * bucket.length))
        for begin in range(0, bucket.rows, step):
            part = slice(begin, begin + step)
            _follow(found, ids, hashes, owner, place, bucket.tokens[part], bucket.lengths[part])
    return found


def _follow(
    found: np.ndarray,
    ids: np.ndarray,
    hashes: np.ndarray,
    owner: np.ndarray,
    place: np.ndarray,
    tokens: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Raise `found` (n,) by what `tokens` (r, l) of `lengths` (r,) share with `ids` (n, w), whose runs begin at the sorted `hashes` (m,),
    in the text `owner` (m,) at `place` (m,)."""
    runs = _runs(tokens.astype(np.uint64))  # (r, l - 3)
    first, last = (np.searchsorted(hashes, runs.ravel(), side=side) for side in ("left", "right"))
    inside = (np.arange(runs.shape[1]) + SHORTEST <= lengths[:, None]).ravel()
    hits = np.flatnonzero((last > first) & inside)
    many = last[hits] - first[hits]
    # Each hit with each of the runs that have its hash: (k,) of the row and column in `tokens`, and of the run.
    row, column = np.divmod(np.repeat(hits, many), max(runs.shape[1], 1))
    run = np.repeat(first[hits] - np.concatenate([[0], np.cumsum(many)[:-1]]), many) + np.arange(many.sum())
    text, at, size = owner[run], place[run], SHORTEST
    while len(row):
        np.maximum.at(found, text, size)
        goes_on = column + size < lengths[row]
        row, column, text, at = row[goes_on], column[goes_on], text[goes_on], at[goes_on]
        same = tokens[row, column + size] == ids[text, at + size]
        row, column, text, at = row[same], column[same], text[same], at[same]
        size += 1


def _runs(ids: np.ndarray) -> np.ndarray:
    """(r, l) uint64 -> (r, l - 3) uint64: the hash of each run of SHORTEST ids."""
    runs = max(0, ids.shape[1] - SHORTEST + 1)
    value: np.ndarray = np.zeros((len(ids), runs), np.uint64)
    for step in range(SHORTEST):
        value = mix(value + ids[:, step : step + runs] + np.uint64(1))
    return value
