"""What a run does at which step, by the step's number alone: how long it is, how fast it learns, what it drops, and what is logged, saved and written after it.

Nothing here knows what has happened, so a run that goes on does at each step what one does that was never stopped.
"""

from __future__ import annotations

from typing import NamedTuple

from fastpoem.config import TrainConfig
from fastpoem.corpus.plan import key_of
from fastpoem.engine.optim import learning_rate
from fastpoem.run.samples import due

DROPOUT = -2  # what the key of a step's masks is made of, beside seed and step


class Calendar(NamedTuple):
    config: TrainConfig
    steps: int  # an epoch

    @property
    def last_step(self) -> int:
        whole = self.config.epochs * self.steps
        return whole if self.config.max_steps is None else min(whole, self.config.max_steps)

    @property
    def length(self) -> str:
        """What the schedule's fall depends on, in words."""
        return f"{self.config.epochs} epochs" if self.config.schedule == "epoch-cosine" else f"{self.last_step} steps"

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        asked = self.config.warmup_steps
        return min(100, self.last_step // 20) if asked is None else asked

    def rate(self, done: int) -> float:
        """The learning rate of the step after `done` others."""
        assert self.config.lr is not None  # `fit` has put a number there
        return learning_rate(
            self.config.schedule,
            self.config.lr,
            done,
            steps_per_epoch=self.steps,
            epochs=self.config.epochs,
            last_step=self.last_step,
            warmup=self.warmup,
        )

    def key(self, done: int) -> int:
        """What the dropout of that step draws from, as an int64."""
        key = key_of(self.config.seed, DROPOUT, done)
        return key - (key >> 63 << 64)

    def ends_epoch(self, step: int) -> bool:
        return step % self.steps == 0

    def is_logged(self, step: int) -> bool:
        """However long the run is; the last step is logged too."""
        return step == 1 or step % self.config.log_every == 0 or self.ends_epoch(step)

    def is_saved(self, step: int) -> bool:
        """Has it a checkpoint, whenever it comes? The last step has one too."""
        every = self.config.save_every
        return bool(every and step % every == 0) or self.ends_epoch(step)

    def is_sampled(self, step: int) -> bool:
        """Are a few poems written after it?"""
        return due(step, self.steps, self.config.sample_every)

    def is_measured(self, step: int) -> bool:
        """Does its epoch end with a look at how many poems are in form?"""
        return self.config.sample_every != 0 and due(step, self.steps, None)
