"""The training step: one function from static tensors to static tensors, the same on every device, with no host synchronisation in it.

Batch, forward, loss with its gradient, backward, gradient norm, clip, AdamW, and the account of what happened, which the loop reads only
when it has something to say. The host's part is `send`: one small message with the poems' places and the learning rate. Because `work`
reads and writes the same memory every time, it can be captured once a shape and replayed (`fastpoem.engine.graphs`).

A step that is divided (among processes, into micro-batches, or both) has three parts instead, of which the first and the last are captured:
`micro` for each share of the poems, forward and backward, whose gradients and losses are added up; `reduce`, one sum over the processes;
`update`, once for all shapes. Each share's gradient is weighted by its part of the step's targets, which the host knows, so the numbers are
those of the whole batch, but for the order of sums.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpoem.corpus.feed import Rows, Shape
from fastpoem.engine.batch import IGNORE, assemble
from fastpoem.engine.kernels import OURS, Kernels
from fastpoem.engine.optim import ALIGN, FlatAdamW
from fastpoem.model.dropout import Masks

GIVE_UP = 5  # steps in a row whose loss or gradient is not finite, those excused left out
HOST = torch.device("cpu")
NOTED = 1024  # losses kept on the device before somebody must look, which stops it


def home(device: torch.device) -> torch.device:
    """Where message, source and account of a step on `device` are: there, but for devices without float64 and with half of int64's operators
    (mps), whose batches are made on the host, and whose results are added up there."""
    return device if device.type in ("cpu", "cuda") else HOST


class Account(NamedTuple):
    """What happened, on the device (or its `home`). Written by `account`."""

    last: Tensor  # (5,) float64: the last step's, as in StepResult
    sums: Tensor  # (5,) float64, as in Totals
    losses: Tensor  # (NOTED,) float32: of the last steps, the newest at the end
    failed_in_a_row: Tensor  # 0-D int64
    most_failed: Tensor  # 0-D int64: in a row, since the start

    @classmethod
    def empty(cls, device: torch.device) -> Account:
        device = home(device)
        last, sums = (torch.zeros(5, dtype=torch.float64, device=device) for _ in range(2))
        in_a_row, most = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        return cls(last, sums, torch.zeros(NOTED, device=device), in_a_row, most)


class StepResult(NamedTuple):
    """What one step did: mean loss over valid targets, gradient norm before clipping, tokens right and counted, whether it was skipped."""

    loss: float
    norm: float
    correct: int
    counted: int
    skipped: bool


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


def account(
    to: Account,
    loss: Tensor,
    norm: Tensor,
    skipped: Tensor,
    valid: Tensor,
    correct: Tensor,
    counted: Tensor,
    excused: Tensor | None = None,
):
    """Add a step to the account. loss, norm 0-D float32; skipped 0-D bool; counts 0-D int64. excused 0-D bool: it was skipped for a
    reason that is no failure, and is neither one of those in a row nor the end of them."""
    to.last.copy_(torch.stack([x.double() for x in (loss, norm, correct, counted, skipped)]))
    weighted = torch.where(skipped, 0.0, loss.double() * valid)
    counts = torch.stack([valid, correct, counted]) * ~skipped
    to.sums.add_(torch.cat([weighted[None], counts, skipped[None]]))
    to.losses.copy_(torch.cat([to.losses[1:], loss[None]]))
    if excused is None:
        to.failed_in_a_row.add_(1).mul_(skipped)
    else:
        to.failed_in_a_row.add_(~excused).mul_(skipped)
    torch.maximum(to.most_failed, to.failed_in_a_row, out=to.most_failed)


class Pieces(NamedTuple):
    """The parts of the step that torch.compile may have remade. autograd: `model`'s gradients come by autograd, not by fastpoem.model.ops.
    masks: it takes what a step drops by (`Masks`); otherwise that is PyTorch's generator."""

    model: Callable[..., Tensor]
    assemble: Callable[..., Any] = assemble
    account: Callable[..., Any] = account
    autograd: bool = False
    masks: bool = False

    @classmethod
    def plain(cls, model: torch.nn.Module, device: torch.device) -> Pieces:
        """Nothing compiled. What `home` leaves out runs on PyTorch's own operators, and on those that everybody uses there."""
        return cls(model, autograd=home(device) != device, masks=device.type == "cpu")


class Sums(NamedTuple):
    """What is added up over the shares of a divided step: views of one flat tensor, so that processes need one sum for all of it."""

    flat: Tensor  # (P + ALIGN,) float32
    gradient: Tensor  # (P,)
    loss: Tensor  # 0-D: over the valid targets
    counts: Tensor  # (3,): valid, correct, counted; exact up to 2^24 tokens a step
    told: Tensor  # (6,): what a process tells all others (fastpoem.engine.world)
    norm: Tensor  # 0-D: of the whole gradient, where the update is divided among processes

    @classmethod
    def of(cls, flat: Tensor) -> Sums:
        tail = flat[-ALIGN:]
        return cls(flat, flat[:-ALIGN], tail[0], tail[1:4], tail[4:10], tail[10])


class TrainStep:
    """`step(rows, lr)` trains on one batch of `poems` poems.

    source: the resident corpus, or the buffer that a step's ids are sent to, at the device's `home`. pad_targets: padding counts in the loss, and
    never in the accuracy. reduce: what is done with the sums of a divided step, between its micro-batches and its update, and raises what these
    raised; None: the step is done at once, and `poems` are all there are of it. accumulate: micro-batches that are added up in this process.
    keep: is given the sums after each micro-batch, which then begin anew. gather: makes `working` whole after a divided update.
    """

    def __init__(
        self,
        pieces: Pieces,
        optimizer: FlatAdamW,
        source: Tensor,
        *,
        poems: int,
        pad_id: int,
        pad_targets: bool = False,
        reduce: Callable[[Sums, Exception | None], None] | None = None,
        accumulate: int = 1,
        keep: Callable[[Tensor], None] | None = None,
        gather: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.pieces, self.optimizer, self.source = pieces, optimizer, source
        self.pad_id, self.pad_targets, self.device = pad_id, pad_targets, optimizer.master.device
        # (B + 1, 2) int64: each poem's place and length, and in the last row as float64 the learning rate and the poems' share of the targets
        self.home = home(self.device)
        self.message = torch.zeros(poems + 1, 2, dtype=torch.int64, device=self.home)
        self.masks = Masks(0, 0)  # what is dropped, where `pieces.masks`
        self.account = Account.empty(self.device)
        self.reduce, self.keep, self.gather = reduce, keep, gather
        self.sums: Sums | None = None
        if reduce is not None and accumulate == 1 and optimizer.grad.dtype == torch.float32:
            self.sums = Sums.of(optimizer.grad_and_tail)
        elif reduce is not None:
            self.sums = Sums.of(torch.zeros(len(optimizer.working) + ALIGN, device=self.device))
        self.launch: Callable[[Shape], None] | None = None  # in place of `work`, or of `micro` where it is divided
        self.launch_update: Callable[[], None] | None = None
        self.forms: Callable[[], int] = lambda: 0  # compiled so far
        self.setup_seconds = 0.0  # of compiling and recording, which is not training

    def __call__(self, rows: Rows, lr: float, key: int | None = None) -> None:
        """A step on these poems. key: stands for seed and step, 64 bits; None: drawn from PyTorch's generator."""
        self.parts([rows], lr, key)

    def parts(self, parts: Sequence[Rows], lr: float, key: int | None = None) -> None:
        """A step on these shares of its poems, one after the other."""
        if key is None and self.pieces.masks:
            key = Masks.drawn().key
        error: Exception | None = None
        try:
            for rows in parts:
                self.masks = Masks(key or 0, rows.first)
                self.send(rows, lr)
                (self.launch or (self.work if self.reduce is None else self.micro))(rows.shape)
                if self.keep is not None and self.sums is not None:
                    self.keep(self.sums.flat)
                    self._begin_sums()
        except Exception as found:
            if self.reduce is None:
                raise
            error = found  # the other processes are to hear of it
        if self.reduce is not None and self.sums is not None:
            self.reduce(self.sums, error)
            (self.launch_update or self.update)()
        if self.gather is not None:
            self.gather(self.optimizer.working)

    def send(self, rows: Rows, lr: float) -> None:
        """Copy a step's poems and its learning rate, which are the host's, into the static tensors. Raises ValueError for what does not
        fit them in shape, dtype or device."""
        where, source = rows.where, rows.source
        if (*where.shape, where.dtype, where.device) != (len(self.message) - 1, 2, torch.int64, HOST):
            raise ValueError(
                f"poems {[*where.shape]} {where.dtype} on {where.device} do not fit the step's {len(self.message) - 1} from the host"
            )
        message = torch.empty(self.message.shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        message[:-1] = where
        message.view(torch.float64)[-1] = torch.tensor([lr, rows.share(self.pad_targets)], dtype=torch.float64)
        self.message.copy_(message, non_blocking=True)
        if source is not None:
            if (source.ndim, source.dtype, source.device) != (1, self.source.dtype, HOST) or len(source) > len(
                self.source
            ):
                raise ValueError(
                    f"ids {[*source.shape]} {source.dtype} on {source.device} do not fit {len(self.source)} of {self.source.dtype} from the host"
                )
            source = source.pin_memory() if self.device.type == "cuda" else source
            self.source[: len(source)].copy_(source, non_blocking=True)

    def work(self, shape: Shape) -> None:
        """One step on what was sent, which is of this shape. Of a divided one: all that this process does."""
        if self.sums is not None:
            self.micro(shape)
            self.update()
            return
        out = self._backward(shape, None if self.optimizer.scale is None else self.optimizer.scale.value)
        self._learn(out.loss.detach(), out.valid, out.correct, out.counted)

    def micro(self, shape: Shape) -> None:
        """Forward and backward of a share of a divided step, added to its sums."""
        assert self.sums is not None
        scale = self.message.view(torch.float64)[-1, 1].float().to(self.device)
        out = self._backward(shape, scale if self.optimizer.scale is None else scale * self.optimizer.scale.value)
        if not self._is_summed_in_place:
            self.sums.gradient.add_(self.optimizer.grad)
        self.sums.loss.add_(out.loss.detach() * out.valid)
        self.sums.counts.add_(torch.stack([out.valid, out.correct, out.counted]))

    def update(self) -> None:
        """Learn from the sums of a divided step, which begin anew."""
        assert self.sums is not None
        valid, correct, counted = self.sums.counts.long().unbind()
        loss, norm = self.sums.loss / self.sums.counts[0].clamp(min=1), self.sums.norm
        self._learn(loss, valid, correct, counted, self.sums.gradient, norm if self.optimizer.is_divided else None)
        self._begin_sums()

    def _begin_sums(self) -> None:
        if self.sums is not None:
            (self.sums.flat[-ALIGN:] if self._is_summed_in_place else self.sums.flat).zero_()

    @property
    def _is_summed_in_place(self) -> bool:
        """Is the gradient of a share of a divided step, the only one here, where the sums want it?"""
        return self.sums is not None and self.sums.flat is self.optimizer.grad_and_tail

    def _backward(self, shape: Shape, scale: Tensor | None) -> Any:
        """The gradient of what was sent, times `scale` (0-D float32), in `optimizer.grad`. Returns `CrossEntropy`."""
        optimizer, pieces = self.optimizer, self.pieces
        batch = pieces.assemble(self.source, self.message[:-1], shape, self.pad_id, self.pad_targets)
        batch = batch if self.home == self.device else batch.to(self.device)
        masks = {"masks": self.masks} if pieces.masks else {}
        logits = pieces.model(batch.inputs, batch.packing, **masks)  # (B * T, V)
        uncounted = self.pad_id if self.pad_targets else None
        out = optimizer.kernels.cross_entropy(logits, batch.targets.flatten(), IGNORE, uncounted, scale)
        out.loss.backward()
        if pieces.autograd:
            optimizer.collect()
        return out

    def _learn(
        self,
        loss: Tensor,
        valid: Tensor,
        correct: Tensor,
        counted: Tensor,
        gradient: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> None:
        """Update from `gradient` (P,), None: the optimizer's own, and note what happened."""
        lr, away = self.message.view(torch.float64)[-1, 0], self.home != self.device
        self.optimizer.lr.copy_(lr.float() if away else lr)
        norm, skipped, excused = self.optimizer.step(loss, gradient, norm)
        told = (loss, norm, skipped, valid, correct, counted)
        self.pieces.account(self.account, *([x.to(self.home) for x in told] if away else told), excused)

    @contextlib.contextmanager
    def rehearsal(self, shape: Shape) -> Iterator[None]:
        """Inside, `work(shape)` does all it ever does and nothing is learned: the learning rate is NaN, at which the update skips the
        step, and account, message and random state are put back."""
        put_back = [*self.account, self.message, *(self.optimizer.scale or ())]
        kept = [tensor.clone() for tensor in put_back]
        state = rng_state(self.device)
        # A packed shape is rounded up, and may be longer than any poem of this model can be.
        most = min(shape.longest - 1, self.optimizer.module.config.n_positions)
        total = min(shape.packed or shape.poems * most, shape.poems * most)
        sizes = [total // shape.poems + (poem < total % shape.poems) for poem in range(shape.poems)]
        where = torch.tensor([[0, size + 1] for size in sizes])
        self.send(Rows(None, where, shape, sum(sizes)), math.nan)
        try:
            yield
        finally:
            self.optimizer.module.zero_grad()  # what fails before `collect` must not be added to later
            self._begin_sums()
            set_rng_state(state, self.device)
            for tensor, old in zip(put_back, kept, strict=True):
                tensor.copy_(old)

    def result(self) -> StepResult:
        """The last step's. Synchronises with the device."""
        loss, norm, correct, counted, skipped = self.account.last.tolist()
        return StepResult(loss, norm, int(correct), int(counted), bool(skipped))

    def totals(self) -> Totals:
        """The sums since `reset`. Synchronises with the device."""
        return read_totals(self.account.sums)

    def reset(self) -> None:
        self.account.sums.zero_()


def rng_state(device: torch.device) -> Tensor:
    """Of the generator that dropout draws from on `device`, as a CPU tensor."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_rng_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def read_totals(sums: Tensor) -> Totals:
    loss_sum, *counts = sums.tolist()
    return Totals(loss_sum, *map(int, counts))


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Rows | None],
    device: torch.device,
    pad_id: int,
    kernels: Kernels = OURS,
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Totals:
    """Loss and accuracy over `batches` with dropout off; the random state is left as it was. Of several processes each has None for the others'
    batches, and `add_up` sums over them; in as many threads, the numbers do not depend on how many they are."""
    was_training = model.training
    model.eval()
    at = home(device)
    every = [
        torch.zeros(4, dtype=torch.float64, device=at)
    ]  # of each batch (4,): loss over valid targets, and the counts
    for rows in batches:
        every.append(torch.zeros_like(every[0]))
        if rows is None:
            continue
        assert rows.source is not None
        batch = assemble(rows.source.to(at), rows.where.to(at), rows.shape, pad_id).to(device)
        out = kernels.cross_entropy(model(batch.inputs, batch.packing), batch.targets.flatten(), IGNORE)
        loss, valid, correct, counted = (x.to(at) for x in (out.loss, out.valid, out.correct, out.counted))
        every[-1].copy_(torch.stack([loss.double() * valid, valid, correct, counted]))
    model.train(was_training)
    sums = torch.zeros(5, dtype=torch.float64, device=at)
    for one in add_up(torch.stack(every)):  # one after the other, whoever did them
        sums[:4] += one
    return read_totals(sums)
