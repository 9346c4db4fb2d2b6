"""The tensors that training goes on with: by file and name, as a checkpoint holds them, and copied while training waits for nothing else.

A copy is made in two stages: three flat buffers at memory speed, between two steps; the rest, and the way to the host, in the thread that writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpoem.engine.fsdp import FullySharded
from fastpoem.engine.step import TrainStep, rng_state, set_rng_state
from fastpoem.engine.world import World
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
        self._copies: dict[str, Tensor] = {}
        optimizer = step.optimizer
        if (
            copied and optimizer.whole is not None
        ):  # of a divided update: on the CPU, not to take from one GPU what all divide
            flats = [optimizer.whole, *(torch.zeros_like(optimizer.whole) for _ in range(2))]
            pinned = device.type == "cuda" and not isinstance(optimizer, FullySharded)
            self._copies = {
                name: flat.pin_memory() if pinned else flat for name, flat in zip(FLATS, flats, strict=True)
            }
        elif copied:  # `clone`: the pages are touched now, not at the first save
            self._copies = {name: flat.clone() for name, flat in self._live().items()}
        optimizer.whole = None

    def tensors(self) -> Tensors:
        """Those in use: what is copied into them is what training goes on with, once `adopt` was called. Of a divided update the copies,
        which `distribute` gives to all."""
        return self._widen(self._named(self._flats()))

    def _live(self) -> dict[str, Tensor]:
        return {name: getattr(self._step.optimizer, name) for name in FLATS}

    def _flats(self) -> dict[str, Tensor]:
        return self._copies if self._step.optimizer.is_divided else self._live()

    def weights(self) -> dict[str, Tensor]:
        """Every weight by name: of a divided update as `collect` found them."""
        return self._widen({WEIGHTS: dict(self._step.optimizer.whole_layout.named(self._flats()["master"]))})[WEIGHTS]

    def adopt(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """What is left to do when a checkpoint has been copied into `tensors()`."""
        optimizer = self._step.optimizer
        if self._narrowed is not None:
            embedding = optimizer.whole_layout.view(self._flats()["master"], EMBEDDING)
            self._narrowed.adopt(tensors[WEIGHTS], embedding)
        optimizer.reload()
        set_rng_state(tensors[OPTIMIZER][f"rng.{self._device.type}"], self._device)

    def distribute(self, world: World) -> None:
        """All processes have what the first has, of a divided update each its slice of it."""
        optimizer, account = self._step.optimizer, self._step.account
        for name in FLATS:
            mine = getattr(optimizer, name)
            if isinstance(optimizer, FullySharded):
                optimizer.from_first(mine, self._copies.get(name))
            elif optimizer.is_divided:
                world.scatter_from_first(mine, self._copies.get(name))
            else:
                world.broadcast(mine)
        for tensor in (optimizer.applied, account.sums, account.losses, account.failed_in_a_row, account.most_failed):
            world.broadcast(tensor)
        for tensor in optimizer.scale or ():
            world.broadcast(tensor)
        optimizer.reload()
        if optimizer.is_divided and not isinstance(optimizer, FullySharded):
            world.gather(optimizer.working, optimizer.mine)

    def collect(self, world: World) -> None:
        """The first process's copies of a divided update are as all have them now, for it to `copy`."""
        optimizer = self._step.optimizer
        for name in FLATS if optimizer.is_divided else ():
            mine, whole = getattr(optimizer, name), self._copies.get(name)
            if isinstance(optimizer, FullySharded):
                optimizer.to_first(mine, whole)
            else:
                world.gather_to_first(mine, whole)

    def copy(self) -> Callable[[], Tensors]:
        """Copy them as they are now. What is returned gives the copy, on the CPU, and may be called in another thread."""
        if not self._step.optimizer.is_divided:
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
        rest = {f"exp_avg.{name}": tensor for name, tensor in optimizer.whole_layout.named(flats["exp_avg"])}
        rest |= {f"exp_avg_sq.{name}": tensor for name, tensor in optimizer.whole_layout.named(flats["exp_avg_sq"])}
        rest |= {"applied": optimizer.applied, "sums": account.sums, "losses": account.losses}
        rest |= {"failed_in_a_row": account.failed_in_a_row, "most_failed": account.most_failed}
        rest |= {} if optimizer.scale is None else {"scale": optimizer.scale.value, "scale_good": optimizer.scale.good}
        rest |= {f"rng.{self._device.type}": rng_state(self._device)}
        return {WEIGHTS: dict(optimizer.whole_layout.named(flats["master"])), OPTIMIZER: rest}

    def _widen(self, tensors: Tensors) -> Tensors:
        return tensors if self._narrowed is None else {**tensors, WEIGHTS: self._narrowed.widen(tensors[WEIGHTS])}


def _on_the_cpu(tensors: Tensors) -> Tensors:
    return {file: {name: tensor.cpu() for name, tensor in group.items()} for file, group in tensors.items()}
