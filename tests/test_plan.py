"""corpus/plan.py: the order of training keeps its promises for any sizes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.corpus.plan import BucketOrder, TextOrder, held_out_rows, key_of, permute, skip
from fastpoem.errors import InputError


@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permute(n, key, np.arange(n))), np.arange(n))


def test_permute_needs_no_memory_for_its_domain():
    tracemalloc.start()
    at = permute(10**12, 7, np.arange(16))
    assert len(set(at.tolist())) == 16
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("n", [5, 16, 37, 300])
def test_positions_are_uniform(n):
    """Chi-squared over where an item lands, many keys: within five sigma of its mean of n - 1."""
    keys = 2000
    landed = np.zeros((n, n))
    for key in range(keys):
        landed[np.arange(n), permute(n, key_of(key), np.arange(n))] += 1
    chi2 = ((landed - keys / n) ** 2 / (keys / n)).sum(axis=1)
    assert abs(chi2.mean() - (n - 1)) < 5 * np.sqrt(2 * (n - 1) / n)
    assert chi2.max() < (n - 1) + 8 * np.sqrt(2 * (n - 1))


def test_pairs_of_positions_are_independent():
    """Where one item lands says nothing of its neighbour: all ordered pairs are equally frequent."""
    n, keys = 7, 10000
    pairs = np.zeros((n, n))
    for key in range(keys):
        first, second = permute(n, key_of(key, 3), np.array([0, 1]))
        pairs[first, second] += 1
    off_diagonal = pairs[~np.eye(n, dtype=bool)]
    expected = keys / (n * (n - 1))
    assert ((off_diagonal - expected) ** 2 / expected).sum() < (n * (n - 1) - 1) + 6 * np.sqrt(2 * n * (n - 1))


def bucket_order(rows, batch, held, seed=0, ends=None):
    held_out = [np.array(sorted({h for b, h in held if b == bucket and h < n})) for bucket, n in enumerate(rows)]
    held_out = [h.astype(np.int64) for h in held_out]
    return BucketOrder(range(10, 10 + len(rows)), rows, held_out, batch, seed, ends), held_out


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.integers(0, 90), min_size=1, max_size=8),
    batch=st.integers(1, 40),
    held=st.sets(st.tuples(st.integers(0, 7), st.integers(0, 89)), max_size=12),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
    cuts=st.none() | st.sets(st.integers(1, 8)),
)
def test_bucket_order_promises(rows, batch, held, seed, epoch, cuts):
    """Whether each bucket is batched by itself or groups of them as one."""
    ends = None if cuts is None else [*sorted(cut for cut in cuts if cut < len(rows)), len(rows)]
    trained = sum(rows) - len({(b, h) for b, h in held if b < len(rows) and h < rows[b]})
    if trained < batch:
        with pytest.raises(InputError, match="fewer than a batch"):
            bucket_order(rows, batch, held, seed, ends)
        return
    order, held_out = bucket_order(rows, batch, held, seed, ends)
    assert order.steps == trained // batch
    steps = [order(epoch, step) for step in range(order.steps)]
    seen = [(b, i) for step in steps for b, i in zip(step.bucket.tolist(), step.index.tolist(), strict=True)]
    assert len(seen) == len(set(seen)) == order.steps * batch  # every poem at most once, whole batches only
    assert trained - len(seen) < batch  # at most batch - 1 left out
    for bucket, index in seen:
        assert 0 <= index < rows[bucket]
        assert index not in held_out[bucket]
    for step in steps:
        assert step.length >= 10 + step.bucket.max()  # the shape holds its longest poem
        assert step.length - 9 in (ends or range(1, len(rows) + 1))
    again, _ = bucket_order(
        rows, batch, held, seed, ends
    )  # a pure function of (seed, epoch, step): asked for backwards, from a fresh object
    for number in reversed(range(order.steps)):
        one = again(epoch, number)
        assert np.array_equal(one.bucket, steps[number].bucket)
        assert np.array_equal(one.index, steps[number].index)


@settings(deadline=None)
@given(poems=st.integers(1, 400), batch=st.integers(1, 40), held=st.integers(0, 30), shuffle=st.booleans())
def test_text_order_promises(poems, batch, held, shuffle):
    held_rows = held_out_rows(poems, held, seed=5)
    assert len(held_rows) == min(held, poems // 20) == len(set(held_rows.tolist()))
    if poems - len(held_rows) < batch:
        return
    order = TextOrder([9], poems, lambda rows: (np.zeros_like(rows), rows), held_rows, batch, 3 if shuffle else None)
    seen = np.concatenate([order(2, step).index for step in range(order.steps)])
    assert len(set(seen.tolist())) == len(seen) == (poems - len(held_rows)) // batch * batch
    assert not set(seen.tolist()) & set(held_rows.tolist())
    if not shuffle:
        assert np.array_equal(seen, np.setdiff1d(np.arange(poems), held_rows)[: len(seen)])


def test_epochs_and_seeds_differ():
    order, _ = bucket_order([500], 10, set())
    other, _ = bucket_order([500], 10, set(), seed=1)
    first = np.concatenate([order(0, step).index for step in range(order.steps)])
    assert (first == np.concatenate([order(1, step).index for step in range(order.steps)])).mean() < 0.05
    assert (first == np.concatenate([other(0, step).index for step in range(order.steps)])).mean() < 0.05


def test_lengths_of_adjacent_batches_are_uncorrelated():
    order, _ = bucket_order([5000, 9000, 700, 4000, 2500], 16, set())
    lengths = np.array([order(epoch, step).length for epoch in range(3) for step in range(order.steps)], float)
    correlation = np.corrcoef(lengths[:-1], lengths[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(lengths))
    thirds = [part.mean() for part in np.array_split(lengths, 3)]  # nor do they drift
    assert max(thirds) - min(thirds) < 5 * lengths.std() / np.sqrt(len(lengths) / 3)


def test_every_row_is_equally_likely_at_every_place():
    """A row's step in the epoch is uniform, carried-over rows included."""
    rows, batch, epochs = [7, 5, 9, 3], 4, 500
    order, _ = bucket_order(rows, batch, set())
    when = {(b, i): np.zeros(order.steps) for b, n in enumerate(rows[:2]) for i in range(n)}
    for epoch in range(epochs):
        for step in range(order.steps):
            for place in zip(*(a.tolist() for a in (order(epoch, step).bucket, order(epoch, step).index)), strict=True):
                if place in when:
                    when[place][step] += 1
    expected = epochs / order.steps
    chi2 = [((counts - counts.sum() / order.steps) ** 2).sum() / expected for counts in when.values()]
    assert max(chi2) < order.steps - 1 + 6 * np.sqrt(2 * (order.steps - 1))


def test_skip():
    assert skip(np.array([0, 1, 5]), np.arange(5)).tolist() == [2, 3, 4, 6, 7]
    assert skip(np.array([], np.int64), np.arange(3)).tolist() == [0, 1, 2]
