"""Bucket edges: exactly the least padding there is, by brute force and on the real histogram."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.corpus.buckets import MANY, choose_buckets, different, merged, padded_positions


def least_padded(histogram: list[int], count: int) -> int:
    """The fewest positions that any `count` edges leave, by trying them all."""
    lengths = [length for length, poems in enumerate(histogram) if poems]
    best = None
    for edges in itertools.combinations(lengths[:-1], min(count, len(lengths)) - 1):
        positions = padded_positions(np.array(histogram), [*edges, lengths[-1]])
        best = positions if best is None else min(best, positions)
    assert best is not None
    return best


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 50) | st.just(0), min_size=1, max_size=11), st.integers(1, 6))
def test_no_edges_pad_less(histogram: list[int], count: int) -> None:
    edges = choose_buckets(histogram, count)
    lengths = [length for length, poems in enumerate(histogram) if poems]
    assert list(edges) == sorted(set(edges))
    assert set(edges) <= set(lengths)
    assert len(edges) == min(count, len(lengths))
    if lengths:
        assert edges[-1] == lengths[-1]
        assert padded_positions(np.array(histogram), edges) == least_padded(histogram, count)


def quadratic(histogram: np.ndarray, count: int) -> int:
    """The same dynamic programme without the hull, for sizes that cannot be tried out."""
    lengths = np.flatnonzero(histogram)
    rows = np.concatenate(([0], np.cumsum(histogram[lengths])))
    best = lengths * rows[1:]
    for _ in range(count - 1):
        cost = lengths[None, :] * (rows[None, 1:] - rows[1:, None])  # (last edge i, edge j)
        cost[np.tril_indices(len(lengths))] = 1 << 60
        best = np.minimum(best, (best[:, None] + cost).min(axis=0))
    return int(best[-1])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(2, 24))
def test_the_hull_finds_what_the_plain_programme_finds(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    histogram = np.zeros(513, np.int64)
    histogram[2:] = rng.integers(0, 10**6, 511) * (rng.random(511) < rng.random()) * rng.choice([1, 1, 1000], 511)
    histogram[rng.integers(2, 513)] += 1
    assert padded_positions(histogram, choose_buckets(histogram, count)) == quadratic(histogram, count)


def test_one_bucket_few_lengths_and_nothing() -> None:
    assert choose_buckets([0, 0, 3, 0, 1], 1) == (4,)
    assert choose_buckets([0, 0, 3, 0, 1], 16) == (2, 4)
    assert choose_buckets([0, 0, 0], 16) == ()
    with pytest.raises(ValueError, match="at least 1"):
        choose_buckets([1], 0)


def test_counts_beyond_64_bits_stay_exact() -> None:
    histogram = np.array([0, 2**62, 2**62, 1, 2**62], dtype=object)
    assert choose_buckets(histogram, 3) == (1, 2, 4)


def test_the_longest_lengths_are_quick() -> None:
    histogram = np.random.default_rng(0).integers(1, 1000, 65536)
    edges = choose_buckets(histogram, 4)
    assert len(edges) == 4
    assert edges[-1] == 65535


@given(
    poems=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9)), min_size=1, max_size=12),
    steps=st.lists(st.integers(1, 40), min_size=12, max_size=12),
    batch=st.integers(1, 20),
)
def test_no_group_of_buckets_is_a_few_poems_over_and_over(poems, steps, batch):
    """`poems`: different ones in each bucket, and how often each stands there."""
    distinct = [count for count, _ in poems]
    edges = np.cumsum(steps)[: len(poems)].tolist()
    ends = merged(edges, [count * copies for count, copies in poems], distinct, batch)
    assert list(ends) == sorted({*ends}) and ends[-1] == len(poems)
    groups = [sum(distinct[begin:end]) for begin, end in zip((0, *ends), ends, strict=False)]
    assert len(groups) <= max(1, sum(distinct) // (MANY * batch))
    assert len(groups) == 1 or min(groups) >= batch


def test_a_large_text_keeps_its_buckets_and_copies_are_seen():
    assert merged([10, 20, 31], [5000, 900, 200], [4000, 900, 200], 16) == (1, 2, 3)
    assert merged([10, 20, 31], [1600, 1600, 1600], [160, 160, 160], 16) == (1, 2, 3)
    assert merged([10, 20, 31], [500, 1, 1], [500, 1, 1], 16) == (3,)  # the two long ones are no batch
    assert merged([10, 20, 31], [1000, 1000, 1000], [10, 10, 10], 16) == (3,)
    rows = np.repeat(np.arange(30, dtype=np.uint16).reshape(10, 3), 5, axis=0)
    assert different(rows, 100) == 10 and different(rows, 4) == 4
