"""Checkpoints beside training: begun between two steps, written by a thread, and waited for only at the end.

Training waits for three copies at memory speed; what goes to the disk is a copy, so that it may take as long as it takes. Several processes
agree first that they have the same weights: a checkpoint of processes that have parted would be believed. What the disk refuses is tried
again with the next checkpoint; after the last step there is none, so a run waits there for somebody to make room, and says how it ended.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastpoem import disk
from fastpoem.engine.fsdp import FullySharded
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.world import World
from fastpoem.errors import Ended
from fastpoem.run import checkpoint
from fastpoem.run.console import Voice
from fastpoem.run.metrics import Metrics
from fastpoem.run.train_state import Tensors, TrainState
from fastpoem.signals import StopRequest

SAVE_SECONDS = 600.0  # between checkpoints, where --save-every does not say which steps have one
PATIENCE, RETRY_SECONDS = 60, 10.0  # how often a finished run's last checkpoint is tried again


class Diverged(Ended):
    """Loss or gradient was not finite in several steps in a row."""


class NotSaved(Ended):
    """Training ended and the disk did not take its last state."""


class NotFinite(ArithmeticError):
    """Weights or moments hold NaN or infinity: no checkpoint to go on from."""


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread of low priority. `error` says why the last one failed, or is None; `by_the_disk`
    whether that is something a person can mend; `ended` when it was done, by time.monotonic()."""

    def __init__(
        self,
        metrics: Metrics,
        beside: Mapping[str, bytes],
        keep: int,
        hold: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """metrics: in the run's folder. beside, keep, hold: as in `checkpoint.write`."""
        self.folder, self._rows, self._beside = metrics.path.parent, metrics.path, beside
        self._keep, self._hold, self._say = keep, hold, say
        self.error: str | None = None
        self.by_the_disk, self.ended = False, time.monotonic()
        self._coming: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_step_back)

    def start(self, done: int, tensors: Callable[[], Tensors], state: Mapping[str, Any], *, last: bool) -> None:
        """Begin to write the checkpoint of step `done` when the one before it is there. What the disk refuses is said, kept in `error`, and not
        raised. tensors: gives them, on the CPU, in the thread. last: training does not go on after it."""
        self.wait()
        self._coming = self._thread.submit(self._run, done, tensors, state, last)

    @property
    def busy(self) -> bool:
        return self._coming is not None and not self._coming.done()

    @property
    def is_time(self) -> bool:
        """Has no checkpoint been written for long? By the clock, so that it costs little, and which step it is makes no difference to any."""
        return not self.busy and time.monotonic() - self.ended >= SAVE_SECONDS

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong that was not the disk's fault."""
        if self._coming is not None:
            self._coming.result()
            self._coming = None

    def close(self) -> None:
        self._thread.shutdown()

    def _run(self, done: int, tensors: Callable[[], Tensors], state: Mapping[str, Any], last: bool) -> None:
        try:
            host = tensors()
            _refuse_non_finite(host)
            with suppress(OSError):  # the state names a place in it
                disk.flush(self._rows)
            checkpoint.write(self.folder, done, host, self._beside, state, self._keep, self._hold)
            self.error = None
        except (OSError, NotFinite) as error:
            self.error = f"the checkpoint of step {done} could not be written: {error}"
            self.by_the_disk = isinstance(error, OSError)
            self._say(self.error + ("" if last else "; training goes on and tries again at the next checkpoint"))
        finally:
            self.ended = time.monotonic()


def agree(done: int, state: TrainState, optimizer: FlatAdamW, world: World) -> None:
    """Wait for the first process, compare the weights of all with its, and give it what of them is only others'. Raises Ended where they
    differ."""
    world.meet()
    is_copied = world.size > 1 and not isinstance(optimizer, FullySharded)
    if is_copied and (wrong := world.differing(optimizer.working)):
        raise Ended(
            f"step {done}: the weights of process {', '.join(map(str, wrong))} differ from those of process 0, so this step has no "
            "checkpoint; --resume goes on from the newest"
        )
    state.collect(world)


def finish(
    saver: Saver,
    metrics: Metrics,
    voice: Voice,
    stop: StopRequest,
    save_again: Callable[[], None],
    is_over: Callable[[], bool],
) -> None:
    """Until the last checkpoint is on the disk. A finished run that the disk refuses waits for somebody to mend that, unless `is_over`."""
    with voice.phase("writing the last checkpoint"):
        saver.wait()
    metrics.flush()
    for _ in range(PATIENCE):
        if saver.error is None or not saver.by_the_disk or is_over():
            break
        voice.say(f"trying again in {RETRY_SECONDS:.0f} s: make room in {saver.folder}, or stop with Ctrl-C")
        stop.wait(RETRY_SECONDS)
        save_again()
        saver.wait()
        metrics.flush()


def insist(done: int, saver: Saver, metrics: Metrics) -> None:
    """Raises Diverged or NotSaved where the state after the last step, `done`, or a row is not on the disk."""
    if saver.error is not None:
        saved = checkpoint.newest_whole(saver.folder)
        newest = f"the newest checkpoint is {saved}" if saved else "no checkpoint was ever written"
        if not saver.by_the_disk:
            raise Diverged(f"{saver.error}; {newest}; start again with a lower --lr")
        mend = "go on from there with --resume" if saved else "start again"
        raise NotSaved(f"{saver.error}; {newest}: make room and {mend}")
    if metrics.error is not None:
        raise NotSaved(f"{metrics.error}; the checkpoint of step {done} is complete")


def _refuse_non_finite(tensors: Tensors) -> None:
    """Raises NotFinite where a floating tensor that training goes on from is not finite."""
    for group in tensors.values():
        for name, tensor in group.items():
            if name.startswith(("transformer.", "exp_avg")) and not all(
                map(math.isfinite, tensor.aminmax())
            ):  # NaN spreads
                raise NotFinite(f"{name} holds NaN or infinity")


def _step_back() -> None:
    """On Linux priorities are a thread's own: let the training's threads have the cores first."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
