"""The tensors that training goes on with: by file and name, as a checkpoint holds them, and copied while training waits for nothing else.

A copy is made in two stages: three flat buffers at memory speed, between two steps; the rest, and the way to the host, in the thread that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpoem.engine.step import TrainStep, rng_state, set_rng_state
from fastpoem.model.hub import WEIGHTS
from fastpoem.model.vocabulary import EMBEDDING, Narrowed
from fastpoem.run.checkpoint import OPTIMIZER

FLATS = ("master", "exp_avg", "exp_avg_sq")

Tensors = dict[str, dict[str, Tensor]]  # by file and name


class TrainState:
    """The tensors of `step`, with every row of the embedding where only some are trained (`narrowed`). copied: `copy` will be called."""

    def __init__(
        self, step: TrainStep, device: torch.device, narrowed: Narrowed | None, *, copied: bool = True
    ) -> None:
        self._step, self._device, self._narrowed = step, device, narrowed
        # One for the run: new ones come from a ring, and could be the one that a graph is being recorded on.
        self._copying: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        # `clone`: the pages are touched now, not at the first save.
        self._copies = {name: getattr(step.optimizer, name).clone() for name in FLATS} if copied else {}

    def tensors(self) -> Tensors:
        """Those in use: what is copied into them is what training goes on with, once `adopt` was called."""
        return self._widen(self._named({name: getattr(self._step.optimizer, name) for name in FLATS}))

    def adopt(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """What is left to do when a checkpoint has been copied into `tensors()`."""
        optimizer = self._step.optimizer
        if self._narrowed is not None:
            self._narrowed.adopt(tensors[WEIGHTS], optimizer.view(optimizer.master, EMBEDDING))
        optimizer.reload()
        set_rng_state(tensors[OPTIMIZER][f"rng.{self._device.type}"], self._device)

    def each(self) -> Iterator[Tensor]:
        """All that processes which train together have in common: what one has when it has another's of these."""
        optimizer, account = self._step.optimizer, self._step.account
        yield from (getattr(optimizer, name) for name in FLATS)
        yield from (optimizer.applied, account.sums, account.losses, account.failed_in_a_row, account.most_failed)
        yield from optimizer.scale or ()

    def copy(self) -> Callable[[], Tensors]:
        """Copy them as they are now. What is returned gives the copy, on the CPU, and may be called in another thread."""
        for name, copy in self._copies.items():
            copy.copy_(getattr(self._step.optimizer, name))
        tensors = self._named(self._copies)
        small = tensors[OPTIMIZER]
        small |= {name: tensor.clone() for name, tensor in small.items() if not name.startswith("exp_avg")}
        copied = None
        if self._device.type == "mps":
            tensors = _on_the_cpu(tensors)
        if self._device.type == "cuda":
            copied = torch.cuda.Event(blocking=True)  # the thread that waits for it sleeps
            copied.record(
                torch.cuda.current_stream(self._device)
            )  # not the current device's, which is another's for cuda:7

        def on_the_host() -> Tensors:
            if copied is None:
                return self._widen(tensors)
            copied.synchronize()
            with torch.cuda.stream(self._copying):  # not training's
                return self._widen(_on_the_cpu(tensors))

        return on_the_host

    def _named(self, flats: Mapping[str, Tensor]) -> Tensors:
        """Every tensor, with the flat ones out of `flats`."""
        optimizer, account = self._step.optimizer, self._step.account
        rest = {f"exp_avg.{name}": tensor for name, tensor in optimizer.named(flats["exp_avg"])}
        rest |= {f"exp_avg_sq.{name}": tensor for name, tensor in optimizer.named(flats["exp_avg_sq"])}
        rest |= {"applied": optimizer.applied, "sums": account.sums, "losses": account.losses}
        rest |= {"failed_in_a_row": account.failed_in_a_row, "most_failed": account.most_failed}
        rest |= {} if optimizer.scale is None else {"scale": optimizer.scale.value, "scale_good": optimizer.scale.good}
        rest |= {f"rng.{self._device.type}": rng_state(self._device)}
        return {WEIGHTS: dict(optimizer.named(flats["master"])), OPTIMIZER: rest}

    def _widen(self, tensors: Tensors) -> Tensors:
        return tensors if self._narrowed is None else {**tensors, WEIGHTS: self._narrowed.widen(tensors[WEIGHTS])}


def _on_the_cpu(tensors: Tensors) -> Tensors:
    return {file: {name: tensor.cpu() for name, tensor in group.items()} for file, group in tensors.items()}
