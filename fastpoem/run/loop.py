"""The training loop: ask the order for a batch, step, log, validate, save. It reads from top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastpoem.config import TrainConfig
from fastpoem.corpus.feed import Feed, validation_steps
from fastpoem.corpus.plan import Order
from fastpoem.engine.optim import learning_rate
from fastpoem.engine.step import GIVE_UP, StepResult, TrainStep, evaluate
from fastpoem.run import checkpoint
from fastpoem.run.metrics import Metrics, Voice, epoch_line, step_line
from fastpoem.run.signals import StopRequest


class Diverged(RuntimeError):
    """Loss or gradient was not finite in several steps in a row."""


@dataclass
class Loop:
    """Everything a run goes on with. `done` optimizer steps are behind it, `seconds` of training among them."""

    config: TrainConfig
    folder: Path
    device: torch.device
    model: nn.Module
    step: TrainStep
    order: Order
    feed: Feed
    validation_rows: np.ndarray
    metrics: Metrics
    voice: Voice
    identity: dict[str, Any]  # what a resumed run must have in common with this one
    done: int = 0
    seconds: float = 0.0
    _unlogged: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "poems": 0, "seconds": 0.0})

    @property
    def last_step(self) -> int:
        whole = self.config.epochs * self.order.steps
        return whole if self.config.max_steps is None else min(whole, self.config.max_steps)

    def run(self) -> int | None:
        """Train to the end. Returns the signal that stopped it early, or None. Raises Diverged."""
        config = self.config
        self.model.train()
        self.voice.start(self.done, self.last_step)
        try:
            with StopRequest() as stop:
                while self.done < self.last_step:
                    self.one_step()
                    epoch_is_over = self.done % self.order.steps == 0
                    if epoch_is_over:
                        self._end_epoch()
                    due = config.save_every is not None and self.done % config.save_every == 0
                    if due or epoch_is_over or stop.signal is not None or self.done == self.last_step:
                        self.save()
                    if stop.signal is not None:
                        return stop.signal
            if (
                self.done % self.order.steps
            ):  # cut short by max_steps: said last, as a longer run would not have said it here
                self._end_epoch()
        finally:
            self.voice.stop()
        return None

    def one_step(self) -> None:
        """Train on the next batch, and say so where it is time to."""
        config, begin = self.config, time.perf_counter()
        epoch, within = divmod(self.done, self.order.steps)
        batch = self.feed(self.order(epoch, within))
        lr = learning_rate(
            config.schedule,
            config.lr,
            self.done,
            steps_per_epoch=self.order.steps,
            epochs=config.epochs,
            last_step=self.last_step,
            warmup=config.warmup_steps,
        )
        result = self.step(batch.to(self.device), lr)
        self.done += 1
        speak = self._is_regular(self.done) or self.done == self.last_step
        if speak or self.device.type == "cpu":  # elsewhere reading would stop the device
            self._check(self.done)
        row = {"step": self.done, "epoch": epoch + 1, "lr": lr, **(_read(result) if speak else {})}
        took = time.perf_counter() - begin
        self.seconds += took
        for name, amount in (("tokens", batch.tokens), ("poems", batch.poems), ("seconds", took)):
            self._unlogged[name] += amount
        if speak:
            tokens, poems, seconds = self._unlogged.values()
            row |= {"poems": batch.poems, "tokens": batch.tokens, "tokens_per_s": tokens / seconds}
            row |= {"poems_per_s": poems / seconds, "seconds": self.seconds}
            self.metrics.write(row)
            left = (self.last_step - self.done) * self.seconds / self.done
            self.voice.say(step_line(row, config.epochs, self.last_step, left))
            self._unlogged = dict.fromkeys(self._unlogged, 0)
        self.voice.advance()

    def _check(self, step: int) -> None:
        if int(self.step.most_failed) >= GIVE_UP:
            saved = checkpoint.listed(self.folder / "checkpoints")
            good = f"the last good checkpoint is {saved[0][1]}" if saved else "no checkpoint was written yet"
            raise Diverged(f"step {step}: loss or gradient was not finite {GIVE_UP} times in a row; {good}; lower --lr")

    def _end_epoch(self) -> None:
        """Say the epoch's averages and the validation's; start the next one's sums."""
        trained = self.step.totals()
        row: dict[str, Any] = {"event": "epoch", "step": self.done, "epoch": -(-self.done // self.order.steps)}
        row |= {"mean_loss": trained.loss, "mean_accuracy": trained.accuracy, "tokens": trained.counted}
        row |= {"skipped": trained.skipped, "val_loss": None, "val_accuracy": None}
        if len(self.validation_rows):
            steps = validation_steps(self.feed.store, self.validation_rows, self.config.batch_size)
            feed = Feed(self.feed.store, "bucket")
            found = evaluate(self.model, map(feed, steps), self.device)
            row |= {"val_loss": found.loss, "val_accuracy": found.accuracy}
        self.step.reset()
        self.metrics.write(row)
        self.voice.say(epoch_line(row, self.config.epochs))

    def save(self) -> None:
        """Write a checkpoint of the state after `done` steps."""
        optimizer, step = self.step.optimizer, self.step
        moments = {
            f"{kind}.{name}": tensor
            for kind, flat in (("exp_avg", optimizer.exp_avg), ("exp_avg_sq", optimizer.exp_avg_sq))
            for name, tensor in optimizer.named(flat)
        }
        counters = {
            "applied": optimizer.applied,
            "sums": step.sums,
            "failed": torch.stack([step.failed_in_a_row, step.most_failed]),
            "rng.cpu": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            counters["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {
            "weights.safetensors": dict(optimizer.named(optimizer.master)),
            "optimizer.safetensors": {**moments, **counters},
        }
        # A longer run would not have had the last row of one that max_steps cuts short.
        lasting = (
            self.metrics.bytes
            if self._is_regular(self.done) or self.done < self.last_step
            else self.metrics.last_row_at
        )
        state = {"seconds": self.seconds, "metrics_bytes": lasting, "identity": self.identity}
        checkpoint.save(self.folder / "checkpoints", self.done, tensors, state, self.config.keep)

    def _is_regular(self, step: int) -> bool:
        """Is this a step that is logged however long the run is?"""
        return step == 1 or step % self.config.log_every == 0 or step % self.order.steps == 0

    def restore(self, state: dict[str, Any], tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        """Go on from a checkpoint's content."""
        optimizer, step = self.step.optimizer, self.step
        weights, rest = tensors["weights.safetensors"], tensors["optimizer.safetensors"]
        with torch.no_grad():
            for name in optimizer.shapes:
                optimizer.view(optimizer.master, name).copy_(weights[name])
                optimizer.view(optimizer.exp_avg, name).copy_(rest[f"exp_avg.{name}"])
                optimizer.view(optimizer.exp_avg_sq, name).copy_(rest[f"exp_avg_sq.{name}"])
            optimizer.applied.copy_(rest["applied"])
            step.sums.copy_(rest["sums"])
            step.failed_in_a_row.copy_(rest["failed"][0])
            step.most_failed.copy_(rest["failed"][1])
        optimizer.reload()
        torch.set_rng_state(rest["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in rest:
            torch.cuda.set_rng_state(rest["rng.cuda"], self.device)
        self.done, self.seconds = state["step"], state["seconds"]


def _read(result: StepResult) -> dict[str, float]:
    """A step's figures for its row. Synchronises with the device."""
    counted = max(1, int(result.counted))
    row = {"loss": float(result.loss), "accuracy": int(result.correct) / counted, "grad_norm": float(result.norm)}
    return row | ({"skipped": 1} if bool(result.skipped) else {})
