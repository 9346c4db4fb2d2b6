"""The training loop: ask the order for a batch, step, log, validate, save. It reads from top to bottom.

Everything a run goes on with is in one of two: its tensors (`Loop.train_state`, where a checkpoint is copied from and to) and what JSON can hold
(`Loop.state`). What is in neither is a pure function of the step (`Loop.calendar`). How a checkpoint comes to the disk is `fastpoem.run.saving`'s.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastpoem_kernels import native
from torch import nn

from fastpoem.config import TrainConfig
from fastpoem.corpus.feed import Feed
from fastpoem.corpus.plan import Order
from fastpoem.engine.exact import shares
from fastpoem.engine.fsdp import FullySharded
from fastpoem.engine.memory import held
from fastpoem.engine.step import GIVE_UP, TrainStep
from fastpoem.engine.world import Notice, World
from fastpoem.errors import Elsewhere, InputError
from fastpoem.model.vocabulary import Narrowed
from fastpoem.run import best, checkpoint, metrics, saving, tally
from fastpoem.run.best import Best
from fastpoem.run.calendar import Calendar
from fastpoem.run.console import Figures, Voice
from fastpoem.run.metrics import Mark, Metrics
from fastpoem.run.samples import MEASURED, Samples, is_finite
from fastpoem.run.saving import Diverged, Saver
from fastpoem.run.tally import NOTHING, Recent, Tally
from fastpoem.run.trackers import Trackers
from fastpoem.run.train_state import TrainState
from fastpoem.run.validate import Told, Validation, validate
from fastpoem.run.words import clock
from fastpoem.signals import Stopped, StopRequest

WORTH_SAYING = 30.0  # seconds that a run takes, before it is said how long it will


@dataclass
class Loop:
    """Everything a run goes on with. `done` optimizer steps are behind it. Begins with `begin`."""

    config: TrainConfig
    folder: Path
    device: torch.device
    model: nn.Module
    step: TrainStep
    order: Order
    feed: Feed
    validation: Validation
    voice: Voice
    identity: dict[str, Any]  # what a resumed run must have in common with this one
    beside: Mapping[str, bytes]  # what lies beside the weights in a model folder
    hold: Callable[[], None]  # raises where the folder is another run's by now
    narrowed: Narrowed | None = None  # where not every id is trained
    world: World = field(default_factory=World)  # the processes that train together
    samples: Samples | None = None  # poems on the way
    on_row: Callable[[dict[str, Any]], object] | None = None  # the caller's, which is given each row as it is written
    done: int = 0
    _is_heard: bool = False  # is there a caller who is given rows, in the first process?
    _raised: BaseException | None = None  # by that caller
    _epoch_due: bool = False  # the last step ended an epoch that has not been summed up yet
    _val_loss: float | None = None  # after the last step, where it ended an epoch

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Open the run's files, to go on from a checkpoint's `state` (whose tensors are in place) or at the beginning.
        Raises OSError, and InputError for a tracker that does not start."""
        self._saved_at: object = None  # where the newest checkpoint stands
        keep = None
        if state is not None:
            self.done, self._epoch_due, self._val_loss = state["step"], state["epoch_due"], state["val_loss"]
            self.tally.restore(state)
            self.best = Best.of(state)
            self._saved_at = (self.done, self._epoch_due)
            if self.world.is_first:  # the others' rows go into a folder of their own, and with it
                keep = Mark(*state["metrics" if self.done < self.last_step else "metrics_at_the_end"])
        self.metrics = Metrics(self.folder, done=self.done, keep=keep, say=self.voice.say, hold=self.hold)
        self.saver = Saver(self.metrics, self.beside, self.config.keep, self.hold, self.voice.say)
        named, settings = self.config.trackers, dataclasses.asdict(self.config)
        try:
            self.metrics.trackers = Trackers(named, self.folder, settings, done=self.done, say=self.voice.say)
        except InputError:
            self.close()
            raise
        if self.samples is not None:
            over = self.done >= self.last_step
            self.samples.begin(
                lambda step: step < self.done or (step == self.done and (over or self.calendar.is_sampled(step)))
            )

    def __post_init__(self) -> None:
        self.train_state = TrainState(self.step, self.device, self.narrowed, copied=self.world.is_first)
        self.tally, self.best, self._forms = Tally(self.step.account.losses), Best(), self.step.forms()
        self._recent, self._estimated = Recent(), False
        self.calendar = Calendar(self.config, self.order.steps)
        self.my_parts, self.parts = shares(self.config, self.world)  # the shares of a step done here, of all

    def close(self) -> None:
        self.saver.close()
        self.metrics.close()

    @property
    def last_step(self) -> int:
        return self.calendar.last_step

    @property
    def arithmetic(self) -> str:
        """What computes, as far as that decides which numbers are dropped, in words."""
        if self.device.type != "cpu":
            return f"{self.device.type}"
        optimizer = self.step.optimizer
        in_c = native.why_not(optimizer.working.dtype) is None
        in_c &= not isinstance(optimizer, FullySharded)
        what = "C on the CPU" if in_c else "PyTorch's operators on the CPU"
        return f"{what} in {torch.get_num_threads()} threads, exactly" if self.config.exact else what

    @property
    def is_over(self) -> bool:
        """All asked for is done, or nothing better has come for --patience epochs."""
        patience = self.config.patience
        return not self._epoch_due and (
            self.done >= self.last_step or (patience is not None and self.best.since >= patience)
        )

    def run(self, stop: StopRequest) -> int | None:
        """Train to the end. Returns the signal that stopped it early, or None. Raises Diverged, NotSaved."""
        asked = False

        def tells() -> Notice:
            nonlocal asked  # on a GPU it is heard a step later, and must not be asked for twice
            asked = self.world.is_first and self._is_time and not asked
            return Notice(stop.signal if self._raised is None else signal.SIGINT, asked)

        self.world.meet()  # the first had a run's files to open
        self._is_heard = self.world.agreed(lambda: self.on_row is not None)
        self.world.tells, self.world.is_training = tells, True
        self.world.signalled = lambda: stop.signal
        with stop.answered(self.voice.say, "stopping after this step"):
            return self._run(stop)

    def stopped_by(self, stop: StopRequest) -> int | None:
        """The signal that came: to this process, or of several to any, once all know."""
        return stop.signal if self.world.size == 1 else self.world.told.stop

    def _run(self, stop: StopRequest) -> int | None:
        self.model.train()
        self.voice.busy = lambda: self.saver.busy
        self.voice.start(self.done, self.last_step, self.order.steps, self.config.epochs, self.metrics.rows)
        try:
            if self.done and self.calendar.is_sampled(self.done) and not self._epoch_due:
                self._sample()  # a signal came before it was done
            while not self.is_over and self.stopped_by(stop) is None:
                if not self._epoch_due:
                    self.one_step()
                if self._epoch_due and not self._end_epoch():
                    break
                if self.is_over or self.calendar.is_saved(self.done):
                    self.save(last=self.is_over)
                elif self._is_time if self.world.size == 1 else self.world.told.save:
                    self.save(passing=True)
                if self.calendar.is_sampled(self.done) and not self.is_over:
                    self._sample()
            if self.stopped_by(stop) is not None and (self.done, self._epoch_due) != self._saved_at:
                self.save(passing=True, last=True)
            self._finish_saving(stop)
            self.world.meet()
            stopped = self.stopped_by(stop)
            if stopped is None and self.done < self.last_step:
                self.voice.say(f"stopped after {self.best.since} epochs without a lower validation loss (--patience)")
            elif stopped is None and not self.calendar.ends_epoch(self.done):
                self._end_epoch()  # cut short by max_steps: said last, as a longer run would not have said it here
            if self.stopped_by(stop) is None and self.config.sample_every != 0:
                self._sample()
            if self._raised is not None:
                self._mend(self._raised)
                raise self._raised
        finally:
            self.voice.stop()
        return self.stopped_by(stop)

    def one_step(self) -> None:
        """Train on the next batch, and say so where it is time to."""
        config, begin, setup = self.config, time.perf_counter(), self.step.setup_seconds
        epoch, within = divmod(self.done, self.order.steps)
        batch = self.order(epoch, within)
        parts = [self.feed(batch, part, self.parts) for part in self.my_parts]
        tokens = parts[0].tokens if parts[0].step is None else parts[0].step[0]  # of the whole step
        lr = self.calendar.rate(self.done)
        self.step.parts(parts, lr, self.calendar.key(self.done))
        self.tally.watch.count += 1
        self.done += 1
        self._val_loss, self._epoch_due = None, self.calendar.ends_epoch(self.done)
        speak = self.calendar.is_logged(self.done) or self.done == self.last_step
        diverged = False
        if speak or self.tally.watch.is_full or self.device.type == "cpu":  # elsewhere looking would stop the device
            for spike in self.tally.look(self.done):
                self.voice.say(spike.told)
            diverged = int(self.step.account.most_failed) >= GIVE_UP
        took = time.perf_counter() - begin - (self.step.setup_seconds - setup)
        if (forms := self.step.forms()) > self._forms:
            self.voice.say(f"step {self.done}: the model was compiled again, which its warm-up should have spared it")
            self._forms = forms
        self.tally.add(tokens, config.batch_size, took)
        if self.voice.live and self.device.type == "cpu":  # where looking costs nothing
            self._show(self._recent.add(self.step.result(), tokens, took))
        if speak or diverged:
            self._tell(epoch, lr, tokens)
        if diverged:
            self._give_up()
        self.voice.advance()
        if not self._estimated and (speak or self.device.type == "cpu"):
            self._estimate()
        if speak:
            self._hear()

    def _tell(self, epoch: int, lr: float, tokens: int) -> None:
        """Write a step's row. Synchronises with the device."""
        result = self.step.result()
        row = {"step": self.done, "epoch": epoch + 1, "lr": lr, "loss": result.loss}
        row |= {"accuracy": result.correct / max(1, result.counted), "grad_norm": result.norm}
        if (scale := self.step.optimizer.scale) is not None:
            row |= {"loss_scale": float(scale.value)}
        row |= {"poems": self.config.batch_size, "tokens": tokens, **self.tally.row(self.step.totals())}
        self.metrics.write(row)
        self.voice.row(row, self.tally.seconds_left(self.last_step - self.done))
        if self.device.type != "cpu":
            self._show((row["loss_mean"], row["accuracy_mean"], row["tokens_per_s"]))

    def _hear(self) -> None:
        """Give the caller the newest row. What that raises ends the run as a signal does: after a checkpoint, and of several processes after
        the next step, which tells the others."""
        if not self._is_heard:
            return
        try:
            if self.on_row is not None and self._raised is None:
                self.on_row(dict(self.metrics.rows[-1]))
        except BaseException as error:
            if self.world.size == 1:
                if (self.done, self._epoch_due) != self._saved_at:
                    self.save(passing=True, last=True)
                self.saver.wait()
                self._mend(error)
                raise
            self._raised = error
        self.world.meet()  # however long that took

    def _mend(self, error: BaseException) -> None:
        if self.saver.error is None:
            error.add_note(f"Step {self.done} is saved: fastpoem.fit(out={str(self.folder)!r}, resume=True) goes on.")

    def _show(self, newest: tuple[float, float, float]) -> None:
        """Have the live display show (loss, accuracy, tokens a second), and what else is known without asking the device."""
        self.voice.figures = Figures(*newest, self.tally.seconds_left(1), held(self.device))

    def _estimate(self) -> None:
        """Say how long the whole run takes, once that can be known."""
        if (left := self.tally.seconds_left(self.last_step - self.done)) is not None:
            self._estimated, whole = True, self.tally.seconds + left
            if left > WORTH_SAYING:
                self.voice.say("the whole run will take about {0}, validation apart", clock(whole))

    def _sample(self) -> None:
        """A few poems from the weights as they are, once a step. A signal that comes meanwhile is the loop's to answer."""
        samples = self.samples
        if samples is not None and not (
            samples.broken or samples.has(self.done) or not is_finite(self.step.optimizer.working)
        ):
            with suppress(Stopped), self.voice.phase("writing a few poems"):
                if poems := samples.take(self.done, self.done / self.order.steps):
                    self.voice.say("poems after step {0:,}:", self.done)
                    for poem in poems:
                        self.voice.say("  " + poem.replace("\n", "\n  "))
        self.world.meet()  # the other processes wait for the first, which writes them

    def _give_up(self) -> None:
        """Save what there is, which the failed steps have not touched, and raise Diverged with where it is."""
        account = self.step.account
        account.failed_in_a_row.zero_()  # or a run that goes on from here would give up at once
        account.most_failed.zero_()
        self.save(passing=True, last=True)
        self.saver.wait()
        self.world.meet()  # torchrun ends all as soon as one has ended
        if not self.world.is_first:
            self._hear()
            raise Elsewhere(f"step {self.done}: loss or gradient was not finite, as process 0 says")
        saved = checkpoint.newest_whole(self.folder)
        good = f"the last good checkpoint is {saved}" if saved else "there is no good checkpoint"
        try:
            self._hear()
        finally:  # whatever that makes of a row without a loss
            raise Diverged(
                f"step {self.done}: loss or gradient was not finite {GIVE_UP} times in a row; {good}; start again with a lower --lr{' or --precision fp32' * (self.step.optimizer.scale is not None)}, "
                "or go on past these poems with --resume"
            )

    def _end_epoch(self) -> bool:
        """Validate, write the epoch's row, start the next one's sums. False where a signal stopped that, to be done again."""
        trained = self.step.totals()
        row: dict[str, Any] = {"event": "epoch", "step": self.done, "epoch": -(-self.done // self.order.steps)}
        row |= {"mean_loss": trained.loss, "mean_accuracy": trained.accuracy, "tokens": trained.counted}
        row |= {"skipped": trained.skipped, "val_loss": None, "val_accuracy": None}
        if len(self.validation.rows):
            batch, table = self.config.batch_size, self.feed.table
            try:
                found = validate(self.validation, self.step, batch, table, self.world, self.voice)
            except Told:
                return False
            row |= {"val_loss": found.loss, "val_accuracy": found.accuracy}
        samples = self.samples if self.calendar.is_measured(self.done) else None
        if samples is not None and not samples.broken and is_finite(self.step.optimizer.working):
            try:
                with self.voice.phase("writing a few poems"):
                    row |= samples.shares()
            except Stopped:
                if self.world.size == 1:
                    return False
        self.world.meet()
        if self.world.size > 1 and self.world.agree_to_stop(self.device):
            return False  # it may have cut the poems short
        if row["val_loss"] is not None:
            self.best.add(self.done, row["val_loss"])
        self._epoch_due, self._val_loss, self.tally.told = False, row["val_loss"], NOTHING
        self.step.reset()
        self.metrics.write(row)
        self.voice.row(row)
        if "in_form" in row:
            told = (f"{row[name]:.0%}" for name in ("in_form", "rhyming"))
            self.voice.say("of {0} poems {1} are in a form, {2} rhyme", MEASURED, *told)
        self._hear()
        return True

    @property
    def _is_time(self) -> bool:
        return self.config.save_every is None and self.saver.is_time

    def save(self, *, passing: bool = False, last: bool = False, again: bool = False) -> None:
        """Begin to write a checkpoint of the state after `done` steps: three copies at memory speed here, the rest in another thread.

        passing: it is not due, and makes way for the next that is. last: training does not go on after it. again: the disk refused it
        before."""
        with self.voice.phase("waiting for the last checkpoint to be written"):
            self.saver.wait()
        self._saved_at = (self.done, self._epoch_due)
        if not again:
            saving.agree(self.done, self.train_state, self.step.optimizer, self.world)
        if self.world.is_first:
            self.saver.start(self.done, self.train_state.copy(), {**self.state(), "passing": passing}, last=last)

    def _finish_saving(self, stop: StopRequest) -> None:
        """Until the last checkpoint is on the disk, or it is in vain to wait for that. Raises Diverged, NotSaved, or what the caller raised."""
        if not self.world.is_first:
            return
        again = partial(self.save, last=True, again=True)
        is_over = lambda: self._raised is not None or self.world.is_asked_to_stop()
        saving.finish(self.saver, self.metrics, self.voice, stop, again, is_over)
        if self._raised is not None and (self.saver.error is not None or self.metrics.error is not None):
            raise self._raised
        saving.insist(self.done, self.saver, self.metrics)

    def state(self) -> dict[str, Any]:
        """Everything else. Two places in metrics.jsonl: a longer run would not have had the last row of one that max_steps cuts short,
        and tells in its next one what that row told."""
        cut_short = self.done == self.last_step and not self.calendar.is_logged(self.done)
        return {
            **self.tally.state(without_last=cut_short),
            "epoch_due": self._epoch_due,
            "val_loss": self._val_loss,
            "best": self.best.state(),
            "metrics": self.metrics.mark(without_last=cut_short),
            "metrics_at_the_end": self.metrics.mark(),
            "length": self.calendar.length,
            "warmup": self.calendar.warmup,
            "arithmetic": self.arithmetic,
            "identity": self.identity,
        }


def check_state(state: Mapping[str, Any]) -> None:
    """Raises Damaged for what `Loop.state` cannot have written."""
    count = lambda value: type(value) is int and value >= 0
    fits = (
        tally.fits(state)
        and best.fits(state)
        and type(state.get("epoch_due")) is bool
        and metrics.fits(state)
        and isinstance(state.get("length"), str)
        and count(state.get("warmup"))
        and isinstance(state.get("arithmetic"), str)
        and isinstance(state.get("identity"), dict)
    )
    if not fits:
        raise checkpoint.Damaged("its state is not one of a run")
