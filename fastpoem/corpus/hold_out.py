"""Which poems are held out of training for validation, and which go with them: "held out" means that training never sees the poem.

A text repeats itself: of 217,561 classical poems 1,879 are copies, and 512 poems drawn from them have a dozen copies elsewhere. All copies
of a poem go to one side, and validation counts it once. What that takes from training is never more than 5% of it, so in a text of many
copies fewer poems are held out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastpoem.corpus.copies import copies_of, repeats
from fastpoem.corpus.plan import held_out_rows, key_of, permute, skip
from fastpoem.corpus.store import TokenStore

TRIES = 4  # times as many poems are drawn as are wanted, at most, where copies stand in the way


class HeldOut(NamedTuple):
    """Rows of the text, int64."""

    validation: np.ndarray  # sorted, a row for each poem that is held out
    left_out: np.ndarray  # sorted: all that training does not see
    copies: int  # of the poems held out, left out with them
    repeats: int  # of poems that are trained on or held out, left out because one of each is enough


def hold_out(store: TokenStore, count: int | None, seed: int, *, dedup: bool = False) -> HeldOut:
    """`count` poems (None: 512) drawn by `seed`, which with their copies are never more than 5%. dedup: of each poem one is trained on.

    Where nothing has copies these are `held_out_rows`."""
    repeated = repeats(store) if dedup else np.empty(0, np.int64)
    distinct = store.rows - len(repeated)
    count, room = len(held_out_rows(distinct, count, seed)), distinct // 20
    held: dict[int, np.ndarray] = {}  # by the first of its copies: all of them
    for begin in range(0, min(TRIES * count, distinct), max(1, count)):
        if len(held) == count or not room:
            break
        places = permute(distinct, key_of(seed, -1), np.arange(begin, min(begin + count, distinct)))
        drawn = skip(repeated, places)
        for group in drawn[:, None] if dedup else copies_of(store, drawn):
            if len(held) < count and len(group) <= room and int(group[0]) not in held:
                held[int(group[0])] = group
                room -= len(group)
    validation = np.array(sorted(held), np.int64)
    left_out = np.sort(np.concatenate([repeated, *held.values()]))
    return HeldOut(validation, left_out, len(left_out) - len(repeated) - len(held), len(repeated))


def one_of_each(store: TokenStore) -> np.ndarray:
    """The first row of each poem, sorted int64: to validate on all of a store, each poem once."""
    return np.setdiff1d(np.arange(store.rows), repeats(store), assume_unique=True)
