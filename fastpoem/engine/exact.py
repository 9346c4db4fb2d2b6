"""Gradients added up in one order, whoever computes them: `--exact`.

Sums of floating point numbers depend on their order, so a step done by two processes ends in other last digits than by one. Here a step is
always cut into the same shards of its poems, at most SHARDS, a power of two, and their gradients are the leaves of one binary tree: shard 0
with 1, 2 with 3, then the pairs. Each process adds up whatever whole branches lie in its own shards. These go round in slices, every process
completes the tree for its slice of the numbers, and the slices are put together. What one process sends is its branches and a slice: for two,
four or eight processes as much as by an ordinary sum.

Bit for bit the same also takes the same computation of each shard: on the CPU, in as many threads (`fastpoem.run.processes`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastpoem.config import TrainConfig
from fastpoem.corpus.feed import share
from fastpoem.engine.step import Sums
from fastpoem.engine.world import World

SHARDS = 8  # processes that may share a step, and into how many shards it is cut where they are fewer


class Branch(NamedTuple):
    """The sum over shards first, first + 1 … first + size - 1. size: a power of two, of which first is a multiple."""

    first: int
    size: int
    sum: Tensor


def shards_of(poems: int) -> int:
    """Of a step of so many poems."""
    return min(SHARDS, 1 << poems.bit_length() - 1)


def shares(config: TrainConfig, world: World) -> tuple[range, int]:
    """(the numbers of this process's shares of a step, how many all have)."""
    parts = shards_of(config.batch_size) if config.exact else world.size * config.accumulate
    return range(parts)[share(parts, world.rank, world.size)], parts


def grow(branches: list[Branch], new: Branch) -> list[Tensor]:
    """Add the branch right of all others, and join what has become whole. Returns memory that is free now."""
    free = []
    while branches and branches[-1].size == new.size and branches[-1].first % (2 * new.size) == 0:
        left = branches.pop()
        free.append(new.sum)
        new = Branch(left.first, 2 * new.size, left.sum.add_(new.sum))
    branches.append(new)
    return free


class Tree:
    """The sums of a step's shards, of which this process computes `mine`. Memory: a gradient for each branch of its own that is not whole yet,
    four at the most."""

    def __init__(self, shards: int, world: World) -> None:
        self.world = world
        ranges = [range(shards)[share(shards, rank, world.size)] for rank in range(world.size)]
        self.mine = ranges[world.rank]
        # (first, size) of the branches that each process has at the end, in order of processes
        self._places = [[(one.first, one.size) for one in _branches_of(mine)] for mine in ranges]
        self._branches: list[Branch] = []
        self._count = 0  # shards of this step so far
        self._free: list[Tensor] = []

    def keep(self, flat: Tensor) -> None:
        """Take the sums of this process's next shard."""
        copy = self._free.pop() if self._free else torch.empty_like(flat)
        self._free += grow(self._branches, Branch(self.mine[self._count], 1, copy.copy_(flat)))
        self._count += 1

    def total(self, sums: Sums) -> None:
        """The sums over all shards into `sums`, but for what processes tell one another, which is added up by itself."""
        told = sums.told.clone()
        while self._count < len(self.mine):  # this process failed: the others are waiting, and will hear of it
            self.keep(sums.flat)
        branches, self._branches, self._count = self._branches, [], 0
        if self.world.size == 1:
            sums.flat.copy_(branches[0].sum)
        else:
            self._complete(branches, sums.flat)
            sums.told.copy_(self.world.add_up(told))
        self._free += [branch.sum for branch in branches]

    def _complete(self, branches: list[Branch], flat: Tensor) -> None:
        size, each = self.world.size, -(-len(flat) // self.world.size)
        padded = [torch.nn.functional.pad(branch.sum, (0, size * each - len(flat))) for branch in branches]
        rows = torch.cat([one.view(size, each) for one in padded], 1)  # (size, branches * each)
        found = self.world.exchange(rows, [each * len(one) for one in self._places])
        whole: list[Branch] = []
        for (first, many), part in zip(chain(*self._places), found.split(each), strict=True):
            grow(whole, Branch(first, many, part))
        every = torch.empty(size * each)
        mine = slice(self.world.rank * each, (self.world.rank + 1) * each)
        every[mine] = whole[0].sum
        self.world.gather(every, mine)
        flat.copy_(every[: len(flat)])


def _branches_of(shards: Iterable[int]) -> list[Branch]:
    """Those that a process with these shards has."""
    found: list[Branch] = []
    for shard in shards:
        grow(found, Branch(shard, 1, torch.zeros(1)))
    return found
