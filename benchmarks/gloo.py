"""A divided step as `benchmarks.scaling` adds it up, against the real one: 1, 2 and 4 processes on this CPU, summing through gloo.

torchrun starts each number of processes once. They then take turns, round after round: the first process alone times steps on its share while
the others sleep; all time steps on their shares, without an exchange; all time the sum of the gradient; all time real divided steps of
fastpoem's engine. Predicted is share + sum, with the share alone and with the shares at once. Where there are more processes than cores, a core
computes several shares in turn, so the share alone counts as often: 4 processes on 2 cores, twice. Only ratios within a round are worth
quoting, as other work on the machine slows all alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.scene import FULL, LENGTH, made_up_rows
from fastpoem.corpus.feed import size_of_share
from fastpoem.engine.memory import keep_freed_memory
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.step import Pieces, TrainStep
from fastpoem.engine.world import World
from fastpoem.model.gpt2 import GPT2

SHAPE = dataclasses.replace(FULL, n_layer=2, n_embd=256, n_head=4)  # the full vocabulary: 7.3 M parameters
PROCESSES = (1, 2, 4)
BATCH, ROUNDS, STEPS = 16, 6, 5
HEAD = """\
| processes | threads each | poems each | share alone ms | shares at once ms | sum ms | predicted ms | real ms | real / predicted | real / (at once + sum) |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


class Round(NamedTuple):
    """Seconds, medians of STEPS."""

    alone: float
    at_once: float
    add: float
    real: float


def median(what: Callable[[], object]) -> float:
    """Seconds of `what`."""
    took = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        what()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS


def work() -> None:
    """One of the processes. The first prints its rounds as JSON."""
    world, device = World.of_environment(), torch.device("cpu")
    torch.set_num_threads(max(1, cores() // world.size))
    keep_freed_memory()
    poems = size_of_share(BATCH, world.size)
    model = GPT2(SHAPE)
    model.initialise(0)
    optimizer = FlatAdamW(model.train(), device, torch.float32, weight_decay=0.01, max_norm=1.0)
    source, rows = torch.zeros(poems * LENGTH, dtype=torch.int16), made_up_rows(SHAPE, poems, LENGTH)
    reduce = world.reduce if world.size > 1 else None  # as fastpoem has it
    whole, divided = (
        TrainStep(Pieces.plain(model, device), optimizer, source, poems=poems, pad_id=0, reduce=one)
        for one in (None, reduce)
    )
    flat = torch.zeros_like(optimizer.grad_and_tail)
    world.join(device)
    rounds = []
    for _ in range(ROUNDS + 1):
        alone = 0.0
        with world.first():
            if world.is_first:
                alone = median(lambda: whole(rows, 2e-5))
        world.add_up(flat)  # so that all begin together
        at_once = median(lambda: whole(rows, 2e-5))
        world.add_up(flat)
        add = median(lambda: world.add_up(flat))
        rounds.append(Round(alone, at_once, add, median(lambda: divided(rows, 2e-5))))
    world.leave()
    if world.is_first:
        print(json.dumps(rounds[1:]))  # the first warms up


def rounds_of(processes: int) -> list[Round]:
    """Of so many processes that torchrun starts."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "benchmarks.gloo"]
    done = subprocess.run([sys.executable, *start], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{processes} processes failed: {done.stderr[-2000:]}")
    return [Round(*one) for one in json.loads(done.stdout)]


def ratio(real: Sequence[float], predicted: Sequence[float]) -> str:
    """The median over rounds, and the least and the most."""
    every = sorted(one / other for one, other in zip(real, predicted, strict=True))
    return f"{statistics.median(every):.2f} ({every[0]:.2f} to {every[-1]:.2f})"


def line(processes: int, rounds: Sequence[Round], there: int) -> str:
    """A row of the table, on so many cores."""
    turns = max(1.0, processes / there)
    alone, at_once, add, real = zip(*rounds, strict=True)
    predicted = [turns * one.alone + one.add for one in rounds]
    contended = [one.at_once + one.add for one in rounds]
    times = (f"{1e3 * statistics.median(column):.0f}" for column in (alone, at_once, add, predicted, real))
    cells = (max(1, there // processes), size_of_share(BATCH, processes), *times)
    return f"| {processes} | {' | '.join(map(str, cells))} | {ratio(real, predicted)} | {ratio(real, contended)} |"


def measured() -> str:
    """The table of docs/scaling.md, of this machine."""
    return "\n".join([HEAD, *(line(processes, rounds_of(processes), cores()) for processes in PROCESSES)])


if __name__ == "__main__":
    work()
