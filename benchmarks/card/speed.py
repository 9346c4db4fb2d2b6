"""How fast: a whole epoch as a user has it, steps at every batch size, and the contenders beside them.

Tokens are those with a target. MFU: model FLOPs of real tokens (`benchmarks.arithmetic`) over the card's published dense rate. A few steps stand
for an epoch where they are evenly spaced over it by their tokens.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import race
from benchmarks.arithmetic import model_flops
from benchmarks.card.place import Deadline, Place
from fastpoem.doctor import machine
from fastpoem.engine.graphs import Graphs
from fastpoem.engine.step import TrainStep
from fastpoem.run.loop import Loop

TURNS = 8  # of contenders: each has short and long batches alike


def epoch(place: Place, seconds: float) -> dict[str, Any]:
    """The default run on the whole text at batch 16. `seconds` of its steps, `setup_s` until the first, `whole_s` with the checkpoint at the
    end; `epoch_s` projected where the time was over before."""
    begin = time.perf_counter()
    with (
        place.folder() as out,
        place.run(out / "run", checked=True, log_every=100, val_poems=place.size(512, 64), sample_every=None) as (
            loop,
            said,
        ),
    ):
        setup, one_step = time.perf_counter() - begin, loop.one_step
        ended, recorded_s = begin, loop.step.setup_seconds

        def counted() -> None:
            nonlocal ended
            one_step()
            if loop.done == loop.last_step or deadline.signal is not None:
                machine.wait(place.device)  # a step is queued long before it is done
            ended = time.perf_counter()

        loop.one_step = counted  # type: ignore[method-assign]
        begun, deadline = time.perf_counter(), Deadline(max(5.0, seconds - setup - 10))
        loop.run(deadline)
        machine.wait(place.device)
        whole, took, steps = time.perf_counter() - begin, ended - begun, loop.done
        tokens, flops = _work(place, loop, range(steps))
        found: dict[str, Any] = {
            "steps": steps,
            "of": loop.order.steps,
            "seconds": took,
            "setup_s": setup,
            "whole_s": whole,
        }
        found |= {"recorded_late_s": loop.step.setup_seconds - recorded_s, "batching": loop.config.batching}
        found |= _rates(place, took, steps * loop.config.batch_size, tokens, flops)
        ends = [row for row in loop.metrics.rows if row.get("event") == "epoch"]
        found |= {"val_loss": ends[-1]["val_loss"] if ends else None, "memory": _memory(place), "said": said[:20]}
        return found | {"epoch_s": took * loop.order.steps / steps}


def batch(poems: int, batching: str, place: Place, seconds: float) -> dict[str, Any]:
    """Steps of `poems` poems, `batching` pack or bucket, compiled and replayed."""
    count = place.size(max(20, min(400, 8000 // poems)), 3)
    if place.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
    begin = time.perf_counter()
    with place.folder() as out:
        settings = {"compile": "on" if place.gpu else "off", "graphs": "auto"}  # all sizes may not fit
        with place.run(out / "run", batching=batching, batch_size=poems, **settings) as (loop, said):
            setup, order = time.perf_counter() - begin, loop.order
            some = np.random.default_rng(0).permutation(order.steps)[: 20 * count].tolist()
            steps = race.spread(some, min(count, len(some)), lambda step: loop.feed(order(0, step)).tokens)
            np.random.default_rng(1).shuffle(steps)
            shapes = {}
            for step in steps:  # each size once: what only first steps pay is not counted
                rows = loop.feed(order(0, step))
                if shapes.setdefault(rows.shape, step) == step:
                    loop.step(rows, 1e-4)
            rounds = []
            for _ in range(3):
                machine.wait(place.device)
                first = time.perf_counter()
                for step in steps:
                    loop.step(loop.feed(order(0, step)), 1e-4)
                machine.wait(place.device)
                rounds.append(time.perf_counter() - first)
            took = sorted(rounds)[1]
            tokens, flops = _work(place, loop, steps)
            found: dict[str, Any] = {"steps": len(steps), "step_ms": 1e3 * took / len(steps), "setup_s": setup}
            found |= _rates(place, took, len(steps) * poems, tokens, flops)
            found |= {
                "memory": _memory(place),
                "sizes": len(shapes),
                "recorded": len(getattr(loop.step.launch, "recorded", ())),
            }
            found |= {
                "epoch_s": took / len(steps) * order.steps,
                "said": [line for line in said if "could not" in line or "failed" in line],
            }
            if place.gpu and found["recorded"]:
                loop.step.launch.recorded.clear()  # type: ignore[union-attr]  # their memory is wanted for the next
                torch.cuda.empty_cache()
                found["nodes"] = nodes(loop.step, next(iter(shapes)))
            return {"nodes": None, **found}


def contender(name: str, poems: int, place: Place, seconds: float) -> dict[str, Any]:
    """Turns of `name` (notebook, or the compiled bf16 Trainer on sorted batches) at this batch size until the time is over; the rate is that of
    all turns together."""
    if name == "trainer, compiled" and importlib.util.find_spec("accelerate") is None:
        name = "loop, compiled"
    scene, store, device = place.scene(), place.store(), place.device.type
    programme = race.Programme(store, device=device, dtype=place.dtype, batch=poems)
    each = max(1, min(place.size(64, 1), len(programme.random) // TURNS, place.size(12_000, 64) // poems))
    turns = TURNS if place.gpu else 2
    chosen = programme.evenly(each * turns)["notebook" if name == "notebook" else "trainer, sorted"]
    begin, hands = time.monotonic(), race.dealt(each * turns, turns)
    with (
        place.folder() as out,
        race.start(scene, place.shape, [name], device=device, batch=poems, cache=place.work, out=out) as contenders,
    ):
        one, done = contenders[name], []
        one.turn(chosen.part(hands[0]), seconds / 2)  # what only first steps pay, and compiling
        setup = time.monotonic() - begin
        for hand in hands:
            mine = chosen.part(hand)
            if done and time.monotonic() - begin + 2 * max(turn["seconds"] for turn in done) > seconds:
                break
            done.append(
                one.turn(mine) | programme.figures(mine) | {"flops": model_flops(place.shape, _inputs(programme, mine))}
            )
    steps, took = sum(turn["steps"] for turn in done), sum(turn["seconds"] for turn in done)
    total = {key: sum(turn[key] for turn in done) for key in ("poems", "tokens", "flops")}
    found = {"by": name, "turns": len(done), "steps": steps, "step_ms": 1e3 * took / steps, "setup_s": setup}
    found |= {
        "by_turn": [turn["poems"] / turn["seconds"] for turn in done],
        "epoch_s": took / steps * len(programme.random),
    }
    return found | _rates(place, took, total["poems"], total["tokens"], total["flops"])


def _inputs(programme: race.Programme, batches: race.Batches) -> list[int]:
    return (programme.lengths[np.array(batches.rows).ravel()] - 1).tolist()


def _rates(place: Place, took: float, poems: int, tokens: int, flops: float) -> dict[str, Any]:
    peak = machine.peak(torch.cuda.get_device_name(place.device)) if place.gpu else None
    share = flops / took / peak.half / 1e12 if peak else None
    return {"poems_per_s": poems / took, "tokens_per_s": tokens / took, "tflop_s": flops / took / 1e12, "mfu": share}


def _work(place: Place, loop: Loop, steps: Iterable[int]) -> tuple[int, int]:
    """(tokens with a target, model FLOPs) of these steps of the first epoch."""
    inputs = [loop.feed(loop.order(0, step)).where[:, 1].numpy() - 1 for step in steps]
    every = np.concatenate(inputs).tolist()
    return sum(every), model_flops(place.shape, every)


def _memory(place: Place) -> dict[str, int] | None:
    """Bytes that PyTorch's allocator had at the most: in use, and taken from the device."""
    if not place.gpu:
        return None
    return {
        "allocated": torch.cuda.max_memory_allocated(place.device),
        "reserved": torch.cuda.max_memory_reserved(place.device),
    }


def nodes(step: TrainStep, shape: Any) -> int | None:
    """Nodes of the graph of a step of this shape, recorded once more with its definition kept. None where nothing tells."""
    made, plain = [], torch.cuda.CUDAGraph

    def keeping(*_: Any, **__: Any) -> Any:
        made.append(plain(keep_graph=True))
        return made[-1]

    count, said = ctypes.c_size_t(0), list[str]()
    with mock.patch.object(torch.cuda, "CUDAGraph", keeping):
        graphs = Graphs(step, said.append)
        graphs.record([shape])
    runtime = _runtime()
    if graphs.broken or not made or runtime is None:
        return None
    failed = runtime.cudaGraphGetNodes(ctypes.c_void_p(made[-1].raw_cuda_graph()), None, ctypes.byref(count))
    return None if failed else count.value


def _runtime() -> Any:
    """CUDA's runtime as this process has loaded it."""
    here = ctypes.CDLL(None)
    if hasattr(here, "cudaGraphGetNodes"):
        return here
    loaded = re.findall(r"\S*/libcudart\.so[.\d]*", Path("/proc/self/maps").read_text())
    return ctypes.CDLL(loaded[0]) if loaded else None
