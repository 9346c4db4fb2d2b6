"""Which lengths to pad to: the bucket edges that leave the least padding over a histogram of lengths.

Poems cluster at a few lengths, so well-chosen edges leave a few per cent of padding where a random batch padded to its
longest is mostly padding. The choice is exact: a dynamic programme over the lengths that occur. With lengths
e_1 < … < e_n, cumulated counts N and cumulated tokens T, the padding of one bucket over the lengths i+1..j is
e_j (N_j - N_i) - (T_j - T_i), so the best last step is a minimum over lines in e_j,

    best_k[j] = e_j N_j - T_j + min_{i<j} (best_{k-1}[i] + T_i - N_i e_j),

whose slopes fall as i grows while the queries e_j rise: a monotone convex hull finds it in O(1) amortised, O(k n) in all,
which matters when lengths reach tens of thousands.
"""

from collections.abc import Iterable, Sequence

import numpy as np


def choose_buckets(histogram: np.ndarray | Sequence[int], count: int = 32) -> tuple[int, ...]:
    """Ascending edges for `histogram[length]` poems of each length; the last edge is the longest length that occurs.

    There are `count` edges, or one for each distinct length where there are fewer. Empty for an empty histogram.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    counts = np.asarray(histogram)
    lengths = [int(length) for length in np.flatnonzero(counts)]
    if len(lengths) <= count:
        return tuple(lengths)
    n = len(lengths)
    rows, tokens = [0], [0]  # Python's integers: exact whatever the size of the corpus
    for length in lengths:
        rows.append(rows[-1] + int(counts[length]))
        tokens.append(tokens[-1] + length * int(counts[length]))

    best: list[int | None] = [0] + [None] * n  # best[j]: least padding of the first j lengths in k buckets
    chosen: list[list[int]] = []  # chosen[k][j]: where the last of the k + 1 buckets begins
    for _ in range(count):
        step: list[int | None] = [None] * (n + 1)
        origin = [0] * (n + 1)
        hull: list[tuple[int, int, int]] = []  # (slope, intercept, i), each the lowest somewhere
        head = 0
        for j in range(1, n + 1):
            before = best[j - 1]
            if before is not None:
                line = (-rows[j - 1], before + tokens[j - 1], j - 1)
                while len(hull) - head >= 2 and _hidden(hull[-2], hull[-1], line):
                    hull.pop()
                hull.append(line)
            edge = lengths[j - 1]
            while len(hull) - head >= 2 and _at(hull[head + 1], edge) <= _at(hull[head], edge):
                head += 1
            if head < len(hull):
                step[j] = edge * rows[j] - tokens[j] + _at(hull[head], edge)
                origin[j] = hull[head][2]
        best = step
        chosen.append(origin)

    edges, j = [], n
    for origin in reversed(chosen):
        edges.append(lengths[j - 1])
        j = origin[j]
    return tuple(reversed(edges))


def padded_positions(histogram: np.ndarray, edges: Sequence[int]) -> int:
    """Positions that the poems of `histogram[length]` take when each is padded to the first edge not below its length."""
    counts = np.asarray(histogram)
    lengths = np.flatnonzero(counts)
    return int((np.asarray(edges, dtype=np.int64)[np.searchsorted(edges, lengths)] * counts[lengths]).sum())


MANY = 8  # batches of different poems that a group of buckets holds at the least


def different(rows: Iterable[np.ndarray], most: int) -> int:
    """How many of the rows differ from one another, counted up to `most`."""
    seen: set[bytes] = set()
    for row in rows:
        seen.add(row.tobytes())
        if len(seen) >= most:
            break
    return len(seen)


def merged(edges: Sequence[int], rows: Sequence[int], different: Sequence[int], batch: int) -> tuple[int, ...]:
    """Where groups of adjacent buckets end that are batched as one, ascending to the number of buckets. `edges`, `rows`, `different`
    (buckets,): the length of each, its poems, and how many of them differ.

    In a small text a bucket of its own is the same few poems together in every epoch, and in one that repeats its lines a batch of copies.
    So there is a group to every `MANY` batches of different poems, with the least padding that so many groups can have, and none has fewer
    than a batch of them.
    """
    histogram: np.ndarray = np.zeros(edges[-1] + 1, np.int64)
    histogram[[*edges]] = rows
    ends, begin = list[int](), 0
    for edge in choose_buckets(histogram, max(1, sum(different) // (MANY * batch))):
        end = edges.index(edge) + 1
        if sum(different[begin:end]) >= batch:
            ends.append(end)
            begin = end
    return (*ends[:-1], len(edges))


def _at(line: tuple[int, int, int], x: int) -> int:
    return line[0] * x + line[1]


def _hidden(a: tuple[int, int, int], b: tuple[int, int, int], c: tuple[int, int, int]) -> bool:
    """Whether `b` is nowhere below both `a` and `c`; the slopes fall from a to c."""
    return (c[1] - a[1]) * (a[0] - b[0]) <= (b[1] - a[1]) * (a[0] - c[0])
