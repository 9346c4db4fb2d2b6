"""An eye on the losses: which steps were far above the ones before them.

Losses are noted on the device and looked at together, now and then, because looking makes the host wait for the device. What is found is
reported and nothing else: a spike is often the data's, and whether to stop is the person's decision.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

from torch import Tensor

WINDOW, AT_LEAST = 100, 30  # losses that one is compared with
FAR = 6.0  # standard deviations
FLAT = 1e-3  # of the mean: a deviation smaller than this is taken to be so large


class Spike(NamedTuple):
    """A loss `z` standard deviations above the mean of the window before it."""

    step: int
    loss: float
    mean: float
    z: float

    @property
    def told(self) -> str:
        return f"step {self.step}: loss {self.loss:.4f} is {self.z:.1f} standard deviations above the mean of the steps before, {self.mean:.4f}"


class Watch:
    """`losses` (n,) float32 on the device, the newest at the end, `count` of them not yet looked at; and the window of finite ones before."""

    def __init__(self, losses: Tensor) -> None:
        self.losses, self.count = losses, 0
        self.window: deque[float] = deque(maxlen=WINDOW)

    @property
    def is_full(self) -> bool:
        return self.count == len(self.losses)

    def look(self, step: int) -> list[Spike]:
        """The spikes among the noted losses, the last of which is that of `step`. Synchronises with the device."""
        losses, first = self.losses[len(self.losses) - self.count :].tolist(), step - self.count + 1
        self.count = 0
        return [spike for at, loss in enumerate(losses, first) if (spike := self._judge(at, loss)) is not None]

    def _judge(self, step: int, loss: float) -> Spike | None:
        if not math.isfinite(loss):  # such a step is skipped and counted elsewhere
            return None
        found = None
        if len(self.window) >= AT_LEAST:
            mean = math.fsum(self.window) / len(self.window)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.window) / len(self.window))
            z = (loss - mean) / max(deviation, FLAT * abs(mean), 1e-12)
            found = Spike(step, loss, mean, z) if z > FAR else None
        self.window.append(loss)
        return found

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "window": list(self.window)}

    def restore(self, state: dict[str, Any]) -> None:
        self.count, self.window = state["count"], deque(state["window"], WINDOW)
