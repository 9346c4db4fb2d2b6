"""What a run is, before it trains, and what came of it, after: a few rows for a person. Programs read config.json and metrics.jsonl."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastpoem.config import TrainConfig
from fastpoem.corpus.feed import Feed
from fastpoem.corpus.given_poems import called
from fastpoem.corpus.plan import BucketOrder, Order
from fastpoem.engine.fsdp import FullySharded
from fastpoem.engine.memory import most_held
from fastpoem.model.gpt2 import count_parameters
from fastpoem.run import checkpoint
from fastpoem.run.given import Given
from fastpoem.run.words import clock, rounded, size

if TYPE_CHECKING:
    from fastpoem.run.loop import Loop

LOOKED_AT = 200  # batches whose padding is counted
SAVED = 12  # bytes of a checkpoint for each weight: itself and its two moments


def before(
    config: TrainConfig, given: Given, loop: Loop, out: Path, dtype: torch.dtype, why: str, batching: str
) -> list[tuple[str, str]]:
    """(label, text) rows. out: the run's folder; why: this precision; batching: what the batches are, with why, in the console's language."""
    say, store, shape, order = loop.voice.words, given.store, given.shape, loop.order
    source, counts = store.manifest["source"], store.manifest["counts"]
    name = str(source.get("name") or store.path.name)
    text = called(Path(config.data[0]), name) if config.data else name
    data = [say("{0:,} poems from {1}", store.rows, text)]
    if held := len(given.validation.rows):
        own = given.validation.own
        data.append(say("validation on {0:,} poems of your own" if own else "{0:,} held out for validation", held))
    data.append(say("{0} tokens", rounded(counts["tokens"])))
    padding = padding_share(order, loop.feed)
    batches = [
        say("{0} poems, {1}", config.batch_size, batching),
        say("{0:.1%} padding", padding) if padding else say("no padding"),
        say("{0:,} steps an epoch", order.steps),
    ]
    if isinstance(order, BucketOrder):
        batches.insert(1, say("{0} length buckets", len(order.ends)))
    began = say("weights from seed {0}", config.seed)
    if not config.from_scratch:
        began = say("weights of {0}", given.hub_name or given.model_folder)
    model = [
        say("{0} layers × {1} wide", shape.n_layer, shape.n_embd),
        say("{0} parameters", f"{count_parameters(shape) / 1e6:.1f} M"),
        began,
    ]
    epochs = loop.last_step / order.steps
    steps = [say("{0} epochs" if epochs != 1 else "1 epoch", f"{epochs:.3g}"), _steps(say, loop.last_step)]
    steps.append(say("learning rate {0:.2g}, {1}", config.lr, config.schedule))
    steps += [say("warm-up {0:,} steps", loop.calendar.warmup)] if loop.calendar.warmup else []
    device = [name_of(loop.device, say), say("in {0} ({1})", str(dtype)[6:], say(why))]
    if loop.world.size > 1:
        divided = "{0} processes, which divide the poems"
        if loop.step.optimizer.is_divided:
            divided += " and the update"
        if isinstance(loop.step.optimizer, FullySharded):
            divided = "{0} processes, which divide the poems, the weights and the update"
        device.insert(1, say(divided, loop.world.size))
    saved = size(SAVED * count_parameters(shape))
    return [
        ("data", say(", ").join(data)),
        ("batches", say(", ").join(batches)),
        ("model", say(", ").join(model)),
        ("device", say(", ").join(device)),
        ("training", say(", ").join(steps)),
        ("checkpoints", say(", ").join([str(out), say("{0} each, {1} kept", saved, config.keep)])),
    ]


def after(loop: Loop, write: str | None) -> list[tuple[str, str]]:
    """(label, text) rows. write: the command that writes poems, to which the model's folder is added; None: a call does."""
    say, rows, here, best = loop.voice.words, [], loop.tally.here, loop.best
    if here["seconds"]:
        poems = here["poems"] / here["seconds"]
        speed = [
            say("{0} in {1}", _steps(say, loop.done), clock(loop.tally.seconds)),
            say("{0} poems/s", rounded(poems)),
            say("{0} tok/s", rounded(here["tokens"] / here["seconds"])),
            say("{0} of memory at most", size(most_held(loop.device))),
        ]
        rows.append(("trained", say(", ").join(speed)))
    if best.step:
        where = checkpoint.folder_of(loop.folder, best.step)
        rows.append(("best", say("validation loss {0:.4f} after step {1:,}, {2}", best.loss, best.step, where)))
    folder = str(loop.folder)
    call = f"fastpoem.Run({folder!r}).generate('春', count=3)"
    rows.append(("write", call if write is None else f"{write} --model {shlex.quote(folder)} --prompt 春"))
    return rows


def _steps(say: Callable[..., str], count: int) -> str:
    return say("{0:,} steps" if count != 1 else "1 step", count)


def name_of(device: torch.device, say: Callable[..., str]) -> str:
    """cuda:0 (NVIDIA H100), cpu (its name, 2 threads)."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    name = platform.processor() or platform.machine()
    if device.type != "cpu":
        return f"{device} ({name})"
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{device} ({name}, {say('{0} threads' if threads != 1 else '1 thread', threads)})"


def padding_share(order: Order, feed: Feed) -> float:
    """Of the positions that a step computes, how many are padding: over batches spread evenly over the first epoch."""
    positions = tokens = 0
    for number in range(min(order.steps, LOOKED_AT)):
        rows = feed(order(0, number * order.steps // min(order.steps, LOOKED_AT)))
        positions += rows.shape.packed or rows.shape.poems * (rows.shape.longest - 1)
        tokens += rows.tokens
    return 1 - tokens / positions
