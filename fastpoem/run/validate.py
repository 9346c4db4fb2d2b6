"""The poems that are validated on: held out of the text, or a set of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastpoem.corpus.feed import Feed, Rows, validation_steps
from fastpoem.corpus.store import TokenStore
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
