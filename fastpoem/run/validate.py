"""The poems that are validated on: held out of the text, or a set of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastpoem.corpus.feed import Feed, Rows, validation_steps
from fastpoem.corpus.store import TokenStore
from fastpoem.engine.fsdp import FullySharded
from fastpoem.engine.step import Totals, TrainStep, evaluate
from fastpoem.engine.world import World
from fastpoem.run.console import Voice


class Told(Exception):
    """To stop, in the middle of a validation."""


class Validation(NamedTuple):
    """Rows (n,) sorted int64 of a store, which is training's where they were held out of it. `own`: it is not."""

    store: TokenStore
    rows: np.ndarray
    own: bool = False

    def batches(
        self, batch: int, table: np.ndarray | None, stop: Callable[[], bool], rank: int = 0, size: int = 1
    ) -> Iterator[Rows | None]:
        """All of them, in batches of like length, their ids numbered by `table`; of `size` processes this one, number `rank`, has each size-th,
        and None for the others'. Raises Told between two where `stop` says so."""
        feed = Feed(self.store, "bucket", table=table)
        for number, step in enumerate(validation_steps(self.store, self.rows, batch)):
            if stop():
                raise Told
            yield feed(step) if number % size == rank else None


def validate(
    validation: Validation,
    step: TrainStep,
    batch: int,
    table: np.ndarray | None,
    world: World,
    voice: Voice,
) -> Totals:
    """Loss and accuracy on all of them by the model of `step`, each process doing its part. Raises Told, in all, where a signal has come to one."""
    model, kernels, poems = step.optimizer.module, step.optimizer.kernels, len(validation.rows)
    share = (world.rank, world.size)
    stop = world.is_asked_to_stop
    if isinstance(
        step.optimizer, FullySharded
    ):  # whose weights all put together, so that all do all, and stop at the same batch
        share, stop = (0, 1), lambda: world.agree_to_stop(step.device)
    batches = validation.batches(batch, table, stop, *share)
    asked = False

    def add_up(every: Tensor) -> Tensor:
        nonlocal asked
        asked = True
        if world.agree_to_stop(step.device):
            raise Told
        if share == (0, 1):
            world.broadcast(every)  # or rounding would be decided by, in each another way
            return every
        return world.add_up(every)

    with voice.phase("validating on {0:,} poems", poems) as at:
        try:
            return evaluate(model, _counted(batches, poems, at, share[1]), step.device, step.pad_id, kernels, add_up)
        except Told:
            if not asked and share != (0, 1):  # the others are to hear of it
                world.agree_to_stop(step.device)
            raise
        finally:
            model.train()


def _counted(
    batches: Iterable[Rows | None], poems: int, at: Callable[[int, int], None], size: int
) -> Iterator[Rows | None]:
    """`batches` as they come, with `at` called with about how many poems were in those before."""
    done = 0
    for rows in batches:
        at(min(done, poems), poems)
        yield rows
        done += 0 if rows is None else len(rows.where) * size
