"""The order of training: which poems make batch `step` of epoch `epoch`, as a pure function of (seed, epoch, step).

Nothing is drawn, stored or replayed: a keyed permutation answers "what stands at position i" on its own, so any step of any epoch can
be asked for directly, in memory that does not depend on the corpus. Random batches (`TextOrder`) are a permutation of the text. In bucket order

* each bucket's rows are permuted and cut into batches; the fewer-than-a-batch left over join the next longer bucket's pool, so an epoch
  has exactly floor(poems / batch) steps and leaves out at most batch - 1 poems;
* the batches of all buckets are permuted together, which removes the saw-tooth of lengths that sorting brings.

Batches of one length teach a little less than random ones (docs/log.md), the less the smaller the text: buckets of few different poems are
taken together (`fastpoem.corpus.buckets.merged`).

The permutation is a generalised Feistel network over Z_a x Z_b with a * b just above n, and cycle walking back into range (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastpoem.errors import InputError

_ROUNDS = 8  # 4 make a strong pseudorandom permutation of a large domain; small ones need more to mix
_U64 = np.uint64


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) on uint64, wrapping."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers; the order of the parts matters."""
    key = np.zeros(1, _U64)
    for part in parts:
        key = mix(key * _U64(0x9E3779B97F4A7C15) + _U64(part & (2**64 - 1)) + _U64(0x632BE59BD9B4E019))
    return int(key[0])


def permute(n: int, key: int, positions: np.ndarray) -> np.ndarray:
    """What the keyed permutation of range(n) has at `positions` (any shape, int64, each in [0, n)); int64 of the same shape."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)  # a * b is at least n, and less than n + a
    round_keys = mix(_U64(key) + np.arange(1, _ROUNDS + 1, dtype=_U64) * _U64(0x9E3779B97F4A7C15))

    def network(x: np.ndarray) -> np.ndarray:
        left: np.ndarray
        right: np.ndarray
        left, right = x // _U64(b), x % _U64(b)  # in [0, a), [0, b)
        for left_key, right_key in round_keys.reshape(-1, 2):
            left = (left + mix(right ^ left_key) % _U64(a)) % _U64(a)
            right = (right + mix(left ^ right_key) % _U64(b)) % _U64(b)
        return left * _U64(b) + right

    out = network(positions.astype(_U64).ravel())
    while (
        outside := np.flatnonzero(out >= _U64(n))
    ).size:  # cycle walking: the permutation of a * b, restricted to range(n)
        out[outside] = network(out[outside])
    return out.astype(np.int64).reshape(positions.shape)


@dataclass(frozen=True)
class Step:
    """The poems of one batch."""

    length: int  # the bucket edge that holds the longest of them
    bucket: np.ndarray  # (B,) int64, the bucket each poem is stored in
    index: np.ndarray  # (B,) int64, its row there


class Order(Protocol):
    """The batches of training: `steps` an epoch, each asked for by (epoch, step), 0 <= step < steps."""

    steps: int

    def __call__(self, epoch: int, step: int) -> Step: ...


def held_out_rows(rows: int, count: int | None, seed: int) -> np.ndarray:
    """Rows of the text to hold out for validation, sorted int64: `count` (None: 512), never more than 5% of them. Where a text repeats
    itself, `fastpoem.corpus.hold_out` has the last word."""
    count = min(512 if count is None else count, rows // 20)
    return np.sort(permute(rows, key_of(seed, -1), np.arange(count)))


def skip(held: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The rows that stand at `index` when the sorted rows `held` are left out of the count."""
    return past(held - np.arange(len(held)), index)


def past(gaps: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`skip` in a time that hardly grows with the rows left out: gaps, made once, how many rows stand before each of them."""
    return index + np.searchsorted(gaps, index, side="right")


def whole_steps(poems: int, batch: int) -> int:
    """floor(poems / batch). Raises InputError where that is nothing."""
    if poems < batch:
        raise InputError(
            f"{poems} poems", f"fewer than a batch of {batch}", "lower --batch-size (or --val-poems), or add poems"
        )
    return poems // batch


class BucketOrder:
    """Batches of poems of like length.

    lengths, rows: (buckets,) ascending edges and rows of each. held_out: for each bucket, its sorted rows that are not trained on. ends: where
    in them each group of buckets that is batched as one ends, ascending to their number; None: each bucket by itself.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        rows: Sequence[int],
        held_out: Sequence[np.ndarray],
        batch: int,
        seed: int,
        ends: Sequence[int] | None = None,
    ) -> None:
        self.held_out, self.batch, self.seed = held_out, batch, seed
        self._gaps = [held - np.arange(len(held)) for held in held_out]
        self.ends = [*range(1, len(rows) + 1)] if ends is None else [*ends]
        self.lengths = [lengths[end - 1] for end in self.ends]  # of each group
        trained = [n - len(held) for n, held in zip(rows, held_out, strict=True)]
        self._first: np.ndarray = np.cumsum([0, *trained])  # row of each bucket, all of them in one line
        self.rows = np.diff(self._first[[0, *self.ends]]).tolist()  # of each group
        self.steps = whole_steps(sum(self.rows), batch)
        self._epoch = -1

    def _start(self, epoch: int) -> None:
        """Resolve which rows each group hands on to the next: O(groups * batch)."""
        groups, batch = len(self.rows), self.batch
        self._keys = [key_of(self.seed, epoch, group) for group in range(groups + 1)]  # the last orders the batches
        self._carried: list[np.ndarray] = []  # into each group's pool: rows in the one line
        self._first_step = [0]
        carry = np.empty(0, np.int64)
        for group, rows in enumerate(self.rows):
            self._carried.append(carry)
            pool = rows + len(carry)
            self._first_step.append(self._first_step[-1] + pool // batch)
            carry = self._pool(group, np.arange(pool - pool % batch, pool))
        self._epoch = epoch

    def lengths_used(self) -> list[int]:
        """The edges of groups that have batches of their own, the same in every epoch."""
        self._start(0)
        return [
            length
            for length, one, next_ in zip(self.lengths, self._first_step, self._first_step[1:], strict=False)
            if next_ > one
        ]

    def _pool(self, group: int, positions: np.ndarray) -> np.ndarray:
        """Rows in the one line at `positions` of a group's permuted pool, which is its own rows and then those carried into it."""
        if not positions.size:
            return positions
        own, carried = self.rows[group], self._carried[group]
        at = permute(own + len(carried), self._keys[group], positions)
        first = self._first[self.ends[group - 1]] if group else 0
        return np.where(at < own, first + at, np.append(carried, 0)[np.clip(at - own, 0, None)])

    def __call__(self, epoch: int, step: int) -> Step:
        if epoch != self._epoch:
            self._start(epoch)
        number = int(permute(self.steps, self._keys[-1], np.array([step]))[0])
        pool = int(np.searchsorted(self._first_step, number, side="right")) - 1
        start = (number - self._first_step[pool]) * self.batch
        line = self._pool(pool, np.arange(start, start + self.batch))
        bucket = np.searchsorted(self._first, line, side="right") - 1
        row = line - self._first[bucket]
        for one in set(bucket.tolist()):
            row[bucket == one] = past(self._gaps[one], row[bucket == one])
        return Step(self.lengths[pool], bucket, row)


class TextOrder:
    """Batches of poems whatever their length, the default: a permutation of the whole text, or with seed None the text as it stands.

    locate: rows of the text (B,) -> (bucket, row in it), both (B,) int64; a store's.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        rows: int,
        locate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        held_out: np.ndarray,
        batch: int,
        seed: int | None,
    ) -> None:
        self.lengths, self.locate, self.held_out, self.batch, self.seed = lengths, locate, held_out, batch, seed
        self.poems, self._gaps = rows - len(held_out), held_out - np.arange(len(held_out))
        self.steps = whole_steps(self.poems, batch)

    def __call__(self, epoch: int, step: int) -> Step:
        bucket, row = self.poems_of(epoch, step, step + 1)
        return Step(self.lengths[int(bucket.max())], bucket, row)

    def poems_of(self, epoch: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, row in it) of the poems of the steps from `first` to before `last`, both ((last - first) * B,) int64."""
        position = np.arange(first * self.batch, last * self.batch)
        if self.seed is not None:
            position = permute(self.poems, key_of(self.seed, epoch), position)
        return self.locate(past(self._gaps, position))
