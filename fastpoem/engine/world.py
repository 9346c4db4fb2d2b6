"""The processes that train together: who they are, how they wait for one another, and the one sum a step.

torchrun starts them, each with its rank in the environment. Two things pass between them. Before training, and wherever the first has something
to do alone, they wait by torchrun's key-value store: by looking, so that preparing a corpus may take as long as it takes and a signal is heard
meanwhile. In training there is one collective a step, a SUM over the gradient with a short tail (`fastpoem.engine.step.Sums`): losses and counts,
and what one process must tell all others, so that all learn, skip, stop and fail at the same step. A collective that one of them does not join
is given up after a minute: by gloo with an error, by NCCL, as it says, by ending the process.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastpoem.engine.step import Sums
from fastpoem.errors import Elsewhere, Ended, InputError, first_line
from fastpoem.signals import ask

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = float(os.environ.get("FASTPOEM_COLLECTIVE_SECONDS", "60"))  # that a process may be late for a collective
LOOKS = 0.02  # seconds between two looks at what is waited for
Value = TypeVar("Value")
_joins = itertools.count()  # of this process: a second run of it must not read what the first left in the store


class Notice(NamedTuple):
    """What a step's sum tells all processes of one another."""

    stop: int | None = None  # the signal that asked one of them to stop
    save: bool = False  # the first wants a checkpoint after this step


@dataclass
class World:
    """This process, number `rank` of `size`, `local_rank` of the `local_size` on its machine. By itself where it is the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0  # how often torchrun has started all of them again
    is_training: bool = False
    tells: Callable[[], Notice] = Notice  # what this process has to tell
    signalled: Callable[[], int | None] = lambda: None  # the signal that has come to this process
    told: Notice = field(default_factory=Notice)  # by any of them, in the newest step
    _store: Any = None
    _names: int = 0
    _on_the_way: Any = None
    _has_left: threading.Event = field(default_factory=threading.Event)
    _beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)  # of others: the newest, and when it came
    _looked: float = 0.0
    _has_passed_on: bool = False

    @classmethod
    def of_environment(cls) -> World:
        """As torchrun says. Raises InputError."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        restarts = int(again) if again.isdecimal() else 0
        if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
            return cls(restarts=restarts)
        try:
            rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
        except (KeyError, ValueError):
            reason = f"needs all of {', '.join(names)} as numbers"
            raise InputError("WORLD_SIZE", reason, "start the processes with torchrun, or unset it") from None
        return cls(rank, size, local_rank, local_size, restarts)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the others, and be ready for collectives."""
        if self.size == 1:
            return
        forever = datetime.timedelta(days=30)
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", timeout=forever)))
        except ValueError as error:
            raise InputError("torchrun", first_line(error), "start the processes with torchrun") from None
        # Names of this run's own: torchrun keeps the store when it starts all again.
        self._store = dist.PrefixStore(f"fastpoem/{self.restarts}/{next(_joins)}", store)
        threading.Thread(target=self._beat, daemon=True).start()
        self.meet()
        backend = "nccl" if device.type == "cuda" else "gloo"
        with self._answered():
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("training", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=datetime.timedelta(seconds=SECONDS),
                device_id=device if device.type == "cuda" else None,
            )

    def leave(self) -> None:
        self._has_left.set()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _beat(self) -> None:
        """Show the others that this process runs, until it has left: a thread, which a process that is stopped or hangs in the system has no
        more than the rest of it."""
        for number in itertools.count():
            with contextlib.suppress(RuntimeError):
                self._store.set(f"alive/{self.rank}", str(number))
            if self._has_left.wait(SECONDS / 12):
                return

    def _watch(self) -> None:
        """Raises Ended where one of those that are waited for has shown no life for as long as a collective would wait. By the first all are
        watched who have begun, by the others the first."""
        now = time.monotonic()
        if now - self._looked < SECONDS / 12:
            return
        self._looked = now
        for rank in range(1, self.size) if self.is_first else (0,):
            if not self._store.check([f"alive/{rank}"]):
                continue
            beat, (last, since) = self._store.get(f"alive/{rank}"), self._beats.get(rank, (b"", now))
            self._beats[rank] = (beat, now if beat != last else since)
            if beat == last and now - since > SECONDS:
                raise RuntimeError("timed out")

    def is_asked_to_stop(self) -> bool:
        """Has a signal come to any process? For what lasts long and is no step, whose sum tells it; then to be followed by `agree_to_stop`."""
        mine = self.signalled() is not None
        if self.size == 1 or mine:
            self._pass_on()
            return mine
        with self._answered():
            return self._store.check(["stop"])

    def _pass_on(self) -> None:
        if self.size > 1 and self.signalled() is not None and not self._has_passed_on:
            self._has_passed_on = True
            with self._answered():
                self._store.set("stop", "1")

    def agree_to_stop(self, device: torch.device) -> bool:
        """Has a signal come to any process? All are told the same, and which (`told`)."""
        if self.size == 1:
            return self.signalled() is not None
        mine = self.signalled()
        stops = self.add_up(torch.tensor([float(mine == one) for one in SIGNALS], device=device)).tolist()
        stop = next((int(one) for one, came in zip(SIGNALS, stops, strict=True) if came), None)
        self.told = self.told._replace(stop=stop)
        return stop is not None

    def fail(self) -> None:
        """Tell those who wait that it is in vain."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set("failed", str(self.rank))

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The first process does what is inside, then all others at once: they find on the disk what it has made."""
        name = self._name()
        if not self.is_first:
            self._wait(lambda: self._store.check([name]))
        yield
        if self.is_first and self.size > 1:
            with self._answered():
                self._store.set(name, "done")

    def agreed(self, value: Callable[[], Value]) -> Value:
        """What the first process finds, for all of them."""
        name = self._name()
        if self.size == 1:
            return value()
        if self.is_first:
            found = value()
            with self._answered():
                self._store.set(name, pickle.dumps(found))
            return found
        self._wait(lambda: self._store.check([name]))
        with self._answered():
            return pickle.loads(self._store.get(name))

    def meet(self) -> None:
        """Wait until all are here: for the first, which may have something to do alone, however long that takes; in training it waits for the
        others no longer than a collective does."""
        name = self._name()
        if self.size == 1:
            return
        with self._answered():
            self._store.add(name, 1)
        if self.is_first:
            self._wait(lambda: self._store.add(name, 0) >= self.size, SECONDS if self.is_training else None)
            with self._answered():
                self._store.set(f"{name}/all", "here")
        else:
            self._wait(lambda: self._store.check([f"{name}/all"]))

    def broadcast(self, tensor: Tensor, rank: int = 0) -> None:
        """`tensor` becomes that of one process."""
        if self.size > 1:
            with self._answered():
                dist.broadcast(tensor, rank)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, in place."""
        if self.size > 1:
            with self._answered():
                dist.all_reduce(tensor)  # SUM: gloo's AVG is silently wrong (pytorch #162338)
        return tensor

    def scatter_sum(self, tensor: Tensor, mine: slice) -> None:
        """tensor[mine] becomes the sum of all processes'; the rest is lost. One of equal slices in the order of ranks each. NCCL's."""
        scatter = (
            getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        )  # its name up to PyTorch 2.12
        scatter(tensor[mine], tensor)

    def exchange(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """Of `tensor` (size, n) row r goes to process r. Returns what came from each, one after the other, of these sizes."""
        found = tensor.new_empty(sum(sizes))
        with self._answered():
            dist.all_to_all_single(found, tensor.flatten(), list(sizes), [tensor.shape[1]] * self.size)
        return found

    def gather(self, tensor: Tensor, mine: slice) -> None:
        """Each process's slice of `tensor` becomes that which it has. Equal slices in the order of ranks."""
        with self._answered():
            whole = tensor.view(torch.uint8)  # gloo knows few types
            each = whole[tensor.element_size() * mine.start : tensor.element_size() * mine.stop]
            gather = (
                getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            )  # its name up to PyTorch 2.12
            gather(whole, each.clone() if tensor.is_cpu else each)

    def gather_to_first(self, mine: Tensor, whole: Tensor | None) -> None:
        """All processes' slices in `whole`, which the first has on the CPU."""
        for rank in range(self.size):
            part = mine if rank == self.rank else torch.empty_like(mine)
            self.broadcast(part, rank)
            if whole is not None:
                whole.view(self.size, -1)[rank].copy_(part)

    def scatter_from_first(self, mine: Tensor, whole: Tensor | None) -> None:
        """Each process's slice out of the first's `whole`, on the CPU."""
        for rank in range(self.size):
            part = torch.empty_like(mine)
            if whole is not None:
                part.copy_(whole.view(self.size, -1)[rank])
            self.broadcast(part)
            if rank == self.rank:
                mine.copy_(part)

    def differing(self, weights: Tensor) -> list[int]:
        """The processes whose `weights` (P,) are not the first's, by the sum of their bits."""
        every = torch.zeros(self.size, dtype=torch.int64, device=weights.device)
        every[self.rank] = weights.view(torch.int16).sum(dtype=torch.int64)
        first, *others = self.add_up(every).tolist()
        return [rank for rank, one in enumerate(others, 1) if one != first]

    def reduce(self, sums: Sums, error: Exception | None, add: Callable[[Sums], object] | None = None) -> None:
        """Add up a step's sums by `add` (None: by one sum over all of them), with what this process tells (`tells`). error: what happened to it in the step, raised here once all
        know; where it happened to another, Ended is raised. What all were told is in `told`, on a GPU a step later, as it is not waited for."""
        if self.size == 1:
            if error is not None:
                raise error
            if add is not None:
                add(sums)
            return
        stop, save = self.tells()
        mine = [*(stop == one for one in SIGNALS), error is not None, (self.rank + 1) * (error is not None), save]
        on_gpu = sums.flat.is_cuda  # which is never waited for: what goes there and back is pinned
        sums.told.copy_(torch.tensor(mine, dtype=torch.float32, pin_memory=on_gpu), non_blocking=True)
        if error is not None:
            sums.gradient.zero_()
        if add is None:
            self.add_up(sums.flat)
        else:
            add(sums)
        if on_gpu:
            heard = torch.empty(len(mine), pin_memory=True).copy_(sums.told, non_blocking=True)
            late, self._on_the_way = self._on_the_way, (heard, torch.cuda.Event())
            self._on_the_way[1].record(torch.cuda.current_stream(sums.flat.device))
            if late is not None:
                late[1].synchronize()
                self._hear(late[0])
        else:
            self._hear(sums.told)
        if error is not None:
            raise error

    def reduce_shards(self, sums: Sums, error: Exception | None, add: Callable[[Sums], object] | None = None) -> None:
        """`reduce` for a step that has collectives in it: where one process failed the others hang in these, so it does not wait for them."""
        if error is not None:
            if isinstance(error, RuntimeError) and (reason := _cause(error)) is not None:
                raise self._ended(reason) from error
            raise error
        self.reduce(sums, None, add)

    def _hear(self, told: Tensor) -> None:
        *stops, failed, ranks, save = map(round, told.tolist())
        self.told = Notice(next((int(one) for one, came in zip(SIGNALS, stops, strict=True) if came), None), save > 0)
        if failed and ranks != self.rank + 1:
            which = f"process {ranks - 1}" if failed == 1 else f"{failed} processes"
            raise Elsewhere(f"{which} of {self.size} failed in this step, and said why")

    def _name(self) -> str:
        self._names += 1
        return str(self._names)

    def _wait(self, over: Callable[[], bool], seconds: float | None = None) -> None:
        begin = time.monotonic()
        with self._answered():
            while not over():
                if self._store.check(["failed"]):
                    raise Elsewhere(f"process {self._store.get('failed').decode()} of {self.size} ended, and said why")
                if seconds is not None and time.monotonic() - begin > seconds:
                    raise RuntimeError("timed out")
                self._watch()
                if self.is_training:  # which answers a signal after a step
                    self._pass_on()
                else:
                    ask()
                time.sleep(LOOKS)

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """What a collective or the store raises where another process is gone or late, in a line."""
        try:
            yield
        except Ended:
            raise
        except RuntimeError as error:
            raise self._ended(_cause(error) or f"may be gone ({first_line(error)})") from error

    def _ended(self, reason: str) -> Ended:
        mend = "; --resume goes on from the newest checkpoint" if self.is_training else ""
        return Ended(f"another of the {self.size} processes {reason}{mend}")


def _cause(error: Exception) -> str | None:
    """What another process has done to a collective that raised this, if it has."""
    text = str(error).lower()
    if "closed" in text or "reset" in text or "broken pipe" in text:
        return "is gone"
    return f"did not answer for {SECONDS:.0f} s" if "timed out" in text or "timeout" in text else None
