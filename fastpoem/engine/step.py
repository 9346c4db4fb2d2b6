"""The training step: one function of tensors, the same on every device, with no host synchronisation in it.

Forward, loss with its gradient, backward, gradient norm, clip, AdamW; what happened is added up in device tensors that the loop reads
only when it has something to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpoem.corpus.feed import IGNORE, Batch
from fastpoem.engine.kernels import OURS, Kernels
from fastpoem.engine.optim import FlatAdamW
from fastpoem.model.attention import Packing

Model = Callable[[Tensor, Packing | None], Tensor]
GIVE_UP = 5  # steps in a row whose loss or gradient is not finite


class StepResult(NamedTuple):
    """What one step did, in 0-D device tensors: loss and norm (before clipping) float32, counts int64, skipped bool."""

    loss: Tensor
    norm: Tensor
    correct: Tensor
    counted: Tensor
    skipped: Tensor


class Totals(NamedTuple):
    """Sums over steps or over a validation set, read from the device."""

    loss_sum: float
    valid: int
    correct: int
    counted: int
    skipped: int

    @property
    def loss(self) -> float:
        """Mean over valid targets."""
        return self.loss_sum / max(1, self.valid)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.counted)


class TrainStep:
    """`step(batch, lr)` trains on one batch.

    pad_id: where padding is a target, the id that counts in the loss but not in the accuracy. compiled: the model's backward pass is
    torch.compile's, not that of fastpoem.model.ops.
    """

    def __init__(self, model: Model, optimizer: FlatAdamW, *, pad_id: int | None, compiled: bool = False) -> None:
        self.model, self.optimizer, self.pad_id, self.compiled = model, optimizer, pad_id, compiled
        device = optimizer.master.device
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)  # as in Totals
        self.failed_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.most_failed = torch.zeros((), dtype=torch.int64, device=device)  # in a row, since the start

    def __call__(self, batch: Batch, lr: float) -> StepResult:
        self.optimizer.lr.fill_(lr)
        if self.compiled:
            self.optimizer.let_autograd_accumulate()
        logits = self.model(batch.inputs, batch.packing)  # (B * T, V)
        out = self.optimizer.kernels.cross_entropy(logits, batch.targets.flatten(), IGNORE, self.pad_id)
        out.loss.backward()
        loss = out.loss.detach()
        norm, skipped = self.optimizer.step(loss)
        weighted = torch.where(skipped, 0.0, loss.double() * out.valid)
        counts = torch.stack([out.valid, out.correct, out.counted]) * ~skipped
        self.sums += torch.cat([weighted[None], counts, skipped[None]])
        self.failed_in_a_row.add_(1).mul_(skipped)
        torch.maximum(self.most_failed, self.failed_in_a_row, out=self.most_failed)
        return StepResult(loss, norm, out.correct, out.counted, skipped)

    def totals(self) -> Totals:
        """The sums since `reset`. Synchronises with the device."""
        return read_totals(self.sums)

    def reset(self) -> None:
        self.sums.zero_()


def read_totals(sums: Tensor) -> Totals:
    loss_sum, *counts = sums.tolist()
    return Totals(loss_sum, *map(int, counts))


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Iterable[Batch], device: torch.device, kernels: Kernels = OURS) -> Totals:
    """Loss and accuracy over `batches` with dropout off; the random state is left as it was."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        out = kernels.cross_entropy(model(batch.inputs, batch.packing), batch.targets.flatten(), IGNORE)
        sums[0] += out.loss.double() * out.valid
        sums[1:4] += torch.stack([out.valid, out.correct, out.counted])
    model.train(was_training)
    return read_totals(sums)
