"""`--dry-run`: everything that a run does before its first step, a few steps to time, and nothing left behind.

The run is assembled for real, in a folder that is removed at the end, so whatever would stop the real one stops this one, with the same line.
A text that was prepared before is taken as it is; another is prepared in that folder. What the compilers and the doctor keep in their
caches stays there.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from fastpoem.config import TrainConfig
from fastpoem.engine.memory import most_held
from fastpoem.engine.world import World
from fastpoem.errors import InputError
from fastpoem.run.console import Voice
from fastpoem.run.fit import assembled
from fastpoem.run.loop import Loop
from fastpoem.run.words import clock, rounded, size
from fastpoem.signals import ask

TIMED, UNTIMED = 8, 2  # steps; a process's first ones are slow
ENOUGH = 30.0  # seconds


def rehearse(config: TrainConfig, voice: Voice) -> None:
    """Print the plan of the run that `config` (checked) asks for, how long it will take and what memory. Raises InputError."""
    if World.of_environment().size > 1:
        raise InputError("--dry-run", "looks at a run of one process", "start it without torchrun")
    with (
        tempfile.TemporaryDirectory(prefix="fastpoem-") as scratch,
        assembled(config, voice, Path(scratch)) as (loop, _),
    ):
        seconds = seconds_a_step(loop)
        say, steps = voice.words, loop.last_step
        speed = say("{0:.2g} s a step", seconds), say("{0} poems/s", rounded(config.batch_size / seconds))
        voice.table(
            [
                (
                    "time",
                    say(", ").join(
                        [say("about {0} for {1:,} steps, validation apart", clock(seconds * steps), steps), *speed]
                    ),
                ),
                ("memory", say("{0} in these steps at most", size(most_held(loop.device)))),
            ]
        )
    voice.say("nothing was written: without --dry-run, this is trained")


def seconds_a_step(loop: Loop) -> float:
    """The mean of a few steps that are spread evenly over the first epoch, the model being changed by them."""
    took: list[float] = []
    with loop.voice.phase("timing {0} steps", TIMED) as at:
        for number in range(-UNTIMED, TIMED):
            ask()
            at(max(0, number), TIMED)
            batch = loop.order(0, max(0, number) * loop.order.steps // TIMED)
            parts = [loop.feed(batch, part, loop.parts) for part in loop.my_parts]
            begin, setup = time.perf_counter(), loop.step.setup_seconds
            loop.step.parts(parts, loop.config.lr or 0.0)
            loop.step.result()  # waits for the device
            took.append(time.perf_counter() - begin - (loop.step.setup_seconds - setup))
            if sum(took) > ENOUGH and number > 0:
                break
    timed = took[UNTIMED:]
    return sum(timed) / len(timed)
