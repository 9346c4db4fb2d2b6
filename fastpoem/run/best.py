"""The checkpoint with the lowest validation loss: which it is, when to stop looking for a better one, and RUN/model made of it.

The last weights are what training was asked for, and often not what it was meant for: a few epochs over a small text, and the validation
loss rises again. So the end of a run names the best checkpoint where it is not the last, `--best` leaves it in RUN/model, and `--patience`
stops when nothing better has come for so many epochs.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpoem.run import checkpoint


@dataclass
class Best:
    """The lowest validation loss of a run so far, the earliest where several are the same."""

    step: int = 0
    loss: float = math.inf
    newest: float = math.inf  # the last one measured
    since: int = 0  # epochs measured after it

    def add(self, step: int, loss: float) -> None:
        self.newest, self.since = loss, self.since + 1
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0

    def state(self) -> list[float | None]:
        """What JSON can hold of it."""
        return [self.step, self.loss if self.step else None, self.since]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Best:
        """As it was in a checkpoint's state."""
        step, loss, since = state["best"]
        newest = state["val_loss"]
        return cls(step, math.inf if loss is None else loss, math.inf if newest is None else newest, since)


def fits(state: Mapping[str, Any]) -> bool:
    """Can a state with this in it have been written?"""
    best, newest = state.get("best"), state.get("val_loss")
    if not (isinstance(best, list) and len(best) == 3 and all(type(one) is int and one >= 0 for one in best[::2])):
        return False
    finite = type(best[1]) is float and math.isfinite(best[1])
    return (finite if best[0] else best[1] is None) and (newest is None or type(newest) is float)


def choose(run: Path, best: Best, last: int, *, wanted: bool) -> tuple[str | None, Mapping[str, Tensor] | None]:
    """(what to say, None where the weights of step `last` are the best; the weights to leave in RUN/model where they are not the last
    ones and `wanted`). A checkpoint that is damaged or gone is said, and the last weights are taken."""
    if best.step in (0, last):
        return None, None
    path = checkpoint.folder_of(run, best.step)
    lowest = f"the lowest validation loss was {best.loss:.4f}, after step {best.step}"
    if math.isfinite(best.newest):
        lowest += f" ({best.newest:.4f} at the end)"
    try:
        weights = checkpoint.read_weights(path)
    except (checkpoint.Damaged, OSError) as error:
        return f"{lowest}; {path} cannot be used ({error}): the model is of the last step", None
    if wanted:
        return f"{lowest}: the model is of that step", weights
    use = shlex.join(["python", "-m", "fastpoem.generate", "--model", str(path)])
    return f"{lowest}; the model is of the last step. To use the other: {use} --prompt 春", None
