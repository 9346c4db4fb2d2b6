"""The poems that are validated on: held out of the text, or a set of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from fastpoem.corpus.feed import Feed, Rows, validation_steps
from fastpoem.corpus.store import TokenStore
from fastpoem.engine.step import Totals, TrainStep, evaluate
from fastpoem.engine.world import World
from fastpoem.run.console import Voice
from fastpoem.signals import StopRequest


class Told(Exception):
    """To stop, in the middle of a validation."""


class Validation(NamedTuple):
    """Rows (n,) sorted int64 of a store, which is training's where they were held out of it. `own`: it is not."""

    store: TokenStore
    rows: np.ndarray
    own: bool = False

    def batches(self, batch: int, table: np.ndarray | None, stop: StopRequest | None) -> Iterator[Rows]:
        """All of them, in batches of like length, their ids numbered by `table`. Raises Told between two where a signal has come to `stop`."""
        feed = Feed(self.store, "bucket", table=table)
        for step in validation_steps(self.store, self.rows, batch):
            if stop is not None and stop.signal is not None:
                raise Told
            yield feed(step)


def validate(
    validation: Validation,
    step: TrainStep,
    batch: int,
    table: np.ndarray | None,
    stop: StopRequest,
    world: World,
    voice: Voice,
) -> Totals:
    """Loss and accuracy on all of them by the model of `step`. Of several processes each does its part and goes on to the end, as it is not to
    leave the others alone; one by itself raises Told where a signal has come to `stop`."""
    model, kernels, poems = step.optimizer.module, step.optimizer.kernels, len(validation.rows)
    batches = validation.batches(batch, table, stop if world.size == 1 else None)
    with voice.phase("validating on {0:,} poems", poems) as at:
        shared = world.rank, world.size, world.add_up
        try:
            return evaluate(model, _counted(batches, poems, at), step.device, step.pad_id, kernels, *shared)
        finally:
            model.train()


def _counted(batches: Iterable[Rows], poems: int, at: Callable[[int, int], None]) -> Iterator[Rows]:
    """`batches` as they come, with `at` called with how many poems were in those before."""
    done = 0
    for rows in batches:
        at(done, poems)
        yield rows
        done += len(rows.where)
