"""What a run has to tell since it last told something: losses and accuracy, speed, skipped steps, spikes, and how long it will still take.

The sums are the step's own, on the device, and read with a row only. What is told already is subtracted, and is a part of a checkpoint: a
resumed run's rows are those of one that was never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastpoem.engine.step import NOTED, StepResult, Totals
from fastpoem.run.watch import WINDOW, Spike, Watch

RECENT = 20  # steps, for figures that are looked at while they change
UNTIMED, TIMED = 5, 5  # a process's first steps are slow, and a few more say how fast the rest will be
NOTHING = Totals(0.0, 0, 0, 0, 0)


@dataclass
class Tally:
    """`losses`: where the device notes them."""

    losses: Tensor
    seconds: float = 0.0  # of training, in this process and those before it
    told: Totals = NOTHING  # of the epoch's sums, those in its rows
    spike: Spike | None = None  # the worst since the last row
    _before_last: tuple[Totals, Spike | None] = (NOTHING, None)  # these two before the last row
    _since: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "poems": 0, "seconds": 0.0})
    here: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "poems": 0, "seconds": 0.0})  # this process's
    _steps: int = 0  # of this process
    _timed: float = 0.0  # seconds of those past the first few

    def __post_init__(self) -> None:
        self.watch = Watch(self.losses)

    def add(self, tokens: int, poems: int, seconds: float) -> None:
        """A step was done."""
        self.seconds += seconds
        for name, amount in (("tokens", tokens), ("poems", poems), ("seconds", seconds)):
            self._since[name] += amount
            self.here[name] += amount
        self._steps += 1
        self._timed += seconds if self._steps > UNTIMED else 0.0

    def look(self, step: int) -> list[Spike]:
        """The spikes that nobody has heard of, up to that of `step`. Synchronises with the device."""
        found = self.watch.look(step)
        self.spike = max([*found, *([self.spike] if self.spike else [])], key=lambda one: one.z, default=None)
        return found

    def row(self, totals: Totals) -> dict[str, Any]:
        """What a row says of the steps since the last one, which begin anew; NaN where all of them were skipped. totals: the epoch's."""
        self._before_last = self.told, self.spike
        loss, valid, correct, counted, skipped = (now - then for now, then in zip(totals, self.told, strict=True))
        row: dict[str, Any] = {"loss_mean": loss / valid if valid else math.nan}
        row |= {"accuracy_mean": correct / counted if counted else math.nan}
        row |= {"skipped": skipped} if skipped else {}
        if self.spike is not None:
            row |= {"spike_step": self.spike.step, "spike_z": self.spike.z}
        tokens, poems, seconds = self._since.values()
        row |= {"tokens_per_s": tokens / seconds, "poems_per_s": poems / seconds, "seconds": self.seconds}
        self.told, self.spike, self._since = totals, None, dict.fromkeys(self._since, 0)
        return row

    def seconds_left(self, steps: int) -> float | None:
        """How long so many steps take at the pace of this process; None where that cannot be known yet."""
        timed = self._steps - UNTIMED
        return steps * self._timed / timed if timed >= TIMED else None

    def state(self, *, without_last: bool) -> dict[str, Any]:
        """What JSON can hold of it; without_last: as if the last row had not been written."""
        told, spike = self._before_last if without_last else (self.told, self.spike)
        return {"seconds": self.seconds, "told": told, "spike": spike, "watch": self.watch.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seconds, self.told = state["seconds"], Totals(*state["told"])
        self.spike = state["spike"] and Spike(*state["spike"])
        self.watch.restore(state["watch"])


class Recent:
    """The last few steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[StepResult, int, float]] = deque(maxlen=RECENT)

    def add(self, result: StepResult, tokens: int, seconds: float) -> tuple[float, float, float]:
        """A step was done: (mean loss, accuracy, tokens a second) of the last few."""
        self._steps.append((result, tokens, seconds))
        results, every, took = zip(*self._steps, strict=True)
        learned = [one for one in results if not one.skipped]
        weights = sum(one.counted for one in learned)
        if not weights:
            return math.nan, math.nan, sum(every) / sum(took)
        loss = sum(one.loss * one.counted for one in learned) / weights
        return loss, sum(one.correct for one in learned) / weights, sum(every) / sum(took)


def fits(state: Mapping[str, Any]) -> bool:
    """Can `Tally.state` have written this?"""
    count = lambda value: type(value) is int and value >= 0
    real = lambda value: type(value) is float and math.isfinite(value)
    told, watch, spike = state.get("told"), state.get("watch"), state.get("spike", ())
    return (
        real(state.get("seconds"))
        and isinstance(told, list)
        and len(told) == len(NOTHING)
        and real(told[0])
        and all(map(count, told[1:]))
        and (
            spike is None
            or (isinstance(spike, list) and len(spike) == 4 and count(spike[0]) and all(map(real, spike[1:])))
        )
        and isinstance(watch, dict)
        and count(watch.get("count"))
        and watch["count"] < NOTED
        and isinstance(watch.get("window"), list)
        and len(watch["window"]) <= WINDOW
        and all(map(real, watch["window"]))
    )
