"""What is learned in an epoch: the notebook's recipe, the default and `fast`, with the neighbours of its rate (0.2 / width), all from scratch and
judged on the same held-out poems. On made-up poems these losses show that nothing diverges, and nothing of quality.

A schedule that falls to zero says nothing halfway. Where an epoch does not fit into the time, `fast` is run to the end of a shorter one, and
`share` says how much of an epoch it was; the two with a constant rate just stop.
"""

from __future__ import annotations

import math
import time
from typing import Any

from benchmarks.card.place import Deadline, Place
from fastpoem.config import RATE_BY_WIDTH
from fastpoem.doctor import machine
from fastpoem.engine.step import evaluate

CURVE = 200  # points of a curve that are kept
SETUP = 30.0  # seconds before the first step, at the most
LEAST = 0.05  # of an epoch
RUNS: dict[str, dict[str, Any]] = {
    "fast, 0.2 / width": {"recipe": "fast"},
    "default": {},
    "fast, 0.4 / width": {"recipe": "fast", "lr": 0.4},
    "fast, 0.1 / width": {"recipe": "fast", "lr": 0.1},
    "notebook": {"recipe": "notebook"},
}


def learn(name: str, place: Place, seconds: float) -> dict[str, Any]:
    """`curve`: (step, mean loss since the last); `val_loss`: at the end; `share` of an epoch that was trained on."""
    begin, settings = time.monotonic(), dict(RUNS[name])
    if "lr" in settings:
        settings["lr"] /= place.shape.n_embd
    elif settings.get("recipe") == "fast":
        settings["lr"] = RATE_BY_WIDTH / place.shape.n_embd
    if name == "notebook":
        settings["precision"] = "fp32"
    with place.folder() as out:
        fits = _steps_that_fit(place, seconds) if settings.get("recipe") == "fast" else None
        more = {"log_every": place.size(50, 5), "val_poems": place.size(512, 64), "max_steps": fits}
        with place.run(out / "run", **{**settings, **more}) as (loop, _):
            loop.save = lambda **_: None  # type: ignore[method-assign]
            begun = time.monotonic()
            loop.run(Deadline(max(3.0, seconds - (begun - begin) - 8)))
            machine.wait(place.device)
            took, rows = time.monotonic() - begun, loop.metrics.rows
            ends = [row["val_loss"] for row in rows if row.get("event") == "epoch" and row["val_loss"] is not None]
            if not ends:
                deadline = Deadline(60)
                batches = loop.validation.batches(
                    loop.config.batch_size, loop.feed.table, lambda: deadline.signal is not None
                )
                ends = [evaluate(loop.model, batches, place.device, loop.step.pad_id, loop.step.optimizer.kernels).loss]
            curve = [(row["step"], row["loss_mean"]) for row in rows if "event" not in row]
            found: dict[str, Any] = {
                "val_loss": ends[-1],
                "steps": loop.done,
                "share": loop.done / loop.order.steps,
                "seconds": took,
            }
            return found | {
                "curve": curve[:: max(1, math.ceil(len(curve) / CURVE))],
                "lr": loop.config.lr,
                "batch": loop.config.batch_size,
            }


def _steps_that_fit(place: Place, seconds: float) -> int | None:
    """Of a schedule that falls to its end, by the speed of the epoch that was timed. None: a whole epoch, as far as is known. Raises
    RuntimeError where it would be too short to say anything."""
    if place.pace is None:
        return None
    setup, each, whole = place.pace
    # The epoch's was with checks, and with compilers whose caches were cold.
    fits = int((seconds - min(setup, SETUP) - 15) / each / 1.1)
    if fits < LEAST * whole:
        raise RuntimeError("too little time for a schedule")
    return None if fits >= whole else fits
