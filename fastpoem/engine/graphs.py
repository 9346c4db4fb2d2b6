"""Replaying the step: recorded once a shape as a CUDA graph, then launched with one call instead of a few hundred.

At 16 poems a step is a millisecond or two of kernels that take longer to launch one by one than to run. A recording is valid because
`TrainStep.work` reads and writes the same memory every time and asks the device nothing. Graphs share one pool of memory: a step's
activations are dead when the next begins, whatever its shape.

On a CPU there is nothing to record: `work` is run again, and then every tensor that it may not rely on next time is spoiled. What trains
the same under that discipline reads nothing stale.
"""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from fastpoem.corpus.feed import Shape
from fastpoem.engine.step import TrainStep
from fastpoem.errors import first_line
from fastpoem.signals import ask

MOST = 256  # recordings: each takes seconds to make and memory to keep, and pays only where its shape comes back


class Graphs:
    """Stands in for `step.work` as `step.launch`, or of a divided step for `micro`, and as `update` for that. Records a shape when it is first
    seen, best by `record` before training begins. No sum over processes is recorded, so what one of them records binds no other."""

    def __init__(self, step: TrainStep, say: Callable[[str], None]) -> None:
        # Weakly, because the step has us: what both hold of the card goes with the step's last name, not when garbage is collected.
        self.step: TrainStep = weakref.proxy(step)  # type: ignore[assignment]
        self.say = say
        self.recorded: dict[Shape, Callable[[], None]] = {}
        self._update: Callable[[], None] | None = None  # of a divided step
        self.broken = False  # a recording failed: no other is tried, and a shape without one is run plainly
        self._failed: Any = None  # its graph
        self.full = False  # there are as many as there may be
        self.bytes = 0  # of the device's free memory that recording took
        on_cuda = step.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_cuda else None
        # One for all: cuBLAS keeps 64 MiB of workspace for every stream it has seen.
        self._aside: Any = torch.cuda.Stream(step.device) if on_cuda else None

    def record(self, shapes: Iterable[Shape]) -> None:
        """The largest first, so that the others find the memory they need in the pool."""
        with nothing_collected():
            largest_first = sorted({*shapes}, key=lambda shape: (shape.packed, shape.longest), reverse=True)
            for shape in largest_first:
                ask()
                self._record(shape)
                if self.step.sums is not None and self._update is None:
                    self._record(shape, update=True)

    def __call__(self, shape: Shape) -> None:
        if shape not in self.recorded and not (self.broken or self.full):
            with nothing_collected():
                self._record(shape)
        run = self.recorded.get(shape)
        if run is None:
            _part(self.step, shape)
        else:
            run()

    def update(self) -> None:
        (self._update or self.step.update)()

    def _record(self, shape: Shape, update: bool = False) -> None:
        """A step of this shape, or of a divided one its share; `update`: what a divided step ends with."""
        if self.broken or self.full:
            return
        step, what = self.step, partial(_part, self.step, None if update else shape)
        if len(self.recorded) >= MOST and not update:
            self.full = True
            self.say(
                f"{MOST} sizes of a step are recorded as CUDA graphs: those of other sizes are launched kernel by kernel"
            )
            return
        if self._pool is None:
            self._keep(partial(again, step, what), shape, update)
            return
        begin, device = time.perf_counter(), step.device
        torch.cuda.empty_cache()  # or what was cached before would count as given back
        free = torch.cuda.mem_get_info(device)[0]
        graph, begun = torch.cuda.CUDAGraph(), False
        try:
            # The outer context puts the stream back where a capture that fails does not.
            with step.rehearsal(shape), torch.cuda.stream(torch.cuda.current_stream(device)):
                self._aside.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(self._aside):  # what is set up lazily may not be set up while recording
                    step.work(shape)  # of a divided one both parts
                torch.cuda.current_stream(device).wait_stream(self._aside)
                # thread_local: a checkpoint may be on its way to the disk in another thread
                with torch.cuda.graph(graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"):
                    begun = True
                    what()
        except Exception as error:  # what is wrong with the step itself will be raised by the plain one
            self.broken = True
            reason = first_line(_first_cause(error))
            if self.recorded:
                which = (
                    f"a step of {shape.packed} tokens" if shape.packed else f"a step of poems of {shape.longest} tokens"
                )
                self.say(
                    f"{which} could not be recorded as a CUDA graph ({reason}): it and new sizes are launched kernel by kernel"
                )
            else:
                self.say(
                    f"the step could not be recorded as a CUDA graph ({reason}): its kernels are launched one by one"
                )
        else:
            self._keep(graph.replay, shape, update)
            self.bytes += free - torch.cuda.mem_get_info(device)[0]
        if self.broken:
            if begun:
                self._end(graph)
            del graph
            torch.cuda.empty_cache()
        step.setup_seconds += time.perf_counter() - begin

    def _keep(self, run: Callable[[], None], shape: Shape, update: bool) -> None:
        if update:
            self._update = run
        else:
            self.recorded[shape] = run

    def _end(self, graph: Any) -> None:
        """A capture that CUDA ended with an error is ended for PyTorch too. Its memory is given back: at once where nothing was recorded
        before, and else with the recordings, whose pool it is."""
        if self.recorded:
            self._failed = graph  # in their stream, whose workspaces would go with it: #193402
        end_failed(graph, self._pool, self.step.device)


def _part(step: TrainStep, shape: Shape | None) -> None:
    """The step of this shape, or of a divided one its share; None: the update that it ends with."""
    if shape is None:
        step.update()
    elif step.sums is None:
        step.work(shape)
    else:
        step.micro(shape)


def end_failed(graph: Any, pool: Any, device: torch.device) -> None:
    """Take PyTorch out of a capture that raised; `graph` was captured into `pool`.

    Up to 2.11 the next dropout would raise ("Offset increment outside graph capture": pytorch #171263, #176752), up to 2.12 the
    allocator would stay in the capture (#180395), up to 2.13 the pool would be lost to the process (#190348).
    """
    if torch.__version__ >= "2.14.dev0":
        return
    with contextlib.suppress(RuntimeError):
        graph.pool()
        return  # it ended well: what failed was Python
    with contextlib.suppress(RuntimeError):  # by 2.13 it is ended
        torch._C._cuda_endAllocateToPool(device.index, pool)
    torch._C._cuda_releasePool(device.index, pool)
    _KEPT.append(graph)
    # The generator leaves its capture at the end of one that succeeds. (With another state in its place the next dropout would do, and
    # the recordings fail, which know the old one.) In a stream of its own, whose workspaces may go.
    number, empty = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(empty, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        number.zero_()


# Graphs that the allocator of pinned memory goes on asking up to PyTorch 2.12: nobody can end their capture for it.
_KEPT: list[Any] = []


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """What is garbage is gone, and nothing is collected inside. The finalizer of a graph (pytorch #161037), or since Triton 3.7 of a
    kernel, asks the driver for what a capture forbids, and breaks it; since 2.9 `torch.cuda.graph` does not collect before. To freeze
    what there is would not do: there may be more inside. Where collection is off already there is nothing to do."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def again(step: TrainStep, what: Callable[[], None]) -> None:
    """Run the step, or a part of it, then spoil what another may not rely on it to have left."""
    what()
    if step.sums is None:
        step.message.fill_(-1)  # a divided step's update reads the learning rate
    step.source.fill_(-1)  # tests on a CPU have no resident corpus
    for _, gradient in step.optimizer.named(step.optimizer.grad):
        if not (step.sums is not None and step.sums.flat is step.optimizer.grad_and_tail):  # which the sum is taken of
            gradient.fill_(torch.nan)
    step.optimizer.lr.fill_(torch.nan)
    step.account.last.fill_(torch.nan)


def _first_cause(error: BaseException) -> BaseException:
    """The last one only says that there was another. A function of its own: kept by a name in the frame where it was caught, it and its
    traceback would hold each other, and with them the activations of the step that failed."""
    while error.__context__ is not None:
        error = error.__context__
    return error
