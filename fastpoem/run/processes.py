"""What each of several processes takes of the machine and of a step: a device, threads, shares of the poems, a slice of the update."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch

from fastpoem.config import TrainConfig
from fastpoem.engine import precision
from fastpoem.engine.exact import SHARDS, shards_of, shares
from fastpoem.engine.world import World
from fastpoem.errors import InputError
from fastpoem.model.gpt2 import GPT2Config, count_parameters
from fastpoem.run.console import Voice


def choose_device(config: TrainConfig, world: World, voice: Voice) -> torch.device:
    """Of several processes, each has the GPU of its local number. Raises InputError."""
    if world.size == 1:
        return precision.choose_device(config.device, voice.say)
    if config.device not in ("auto", "cpu", "cuda"):
        mend = "use --device cuda, with CUDA_VISIBLE_DEVICES to choose cards, or --device cpu"
        raise InputError(f"--device {config.device}", f"cannot be shared by {world.size} processes", mend)
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    try:
        return precision.choose_device(f"cuda:{world.local_rank}", voice.say)
    except InputError as error:
        error.here = True
        raise


def check_shares(config: TrainConfig, device: torch.device, world: World) -> None:
    """Raises InputError where a step cannot be shared as `config` says."""
    if config.exact and device.type != "cpu":
        raise InputError("--exact", f"is for CPUs, not for {device}", "leave it out, or use --device cpu")
    if config.exact and config.accumulate > 1:
        raise InputError("--exact", "has micro-batches of its own", "leave out --accumulate")
    if config.exact and world.size > SHARDS:
        raise InputError("--exact", f"is for at most {SHARDS} processes, not {world.size}", "start fewer")
    if config.exact and world.size > shards_of(config.batch_size):
        least = 1 << (world.size - 1).bit_length()
        reason = f"takes --batch-size {least} or more for {world.size} processes, not {config.batch_size}"
        raise InputError("--exact", reason, "raise it, or start fewer processes")
    if config.parallel == "fsdp" and world.size > 1:
        for name, value in (("compile", config.compile), ("graphs", config.graphs), ("exact", config.exact)):
            if value in ("on", True):
                flag = f"--{name}" + " on" * (value == "on")
                raise InputError("--parallel fsdp", f"does not go together with {flag}", "leave out one of them")
        if config.precision == "fp16":
            raise InputError("--parallel fsdp", "is for bf16 and fp32, not for fp16", "use --precision bf16")
    _, parts = shares(config, world)
    if parts > config.batch_size:
        reason = f"fewer poems than the {parts} parts of a step ({world.size} processes, {config.accumulate} micro-batches each)"
        mend = "raise it, or lower --accumulate" + (" or start fewer processes" if world.size > 1 else "")
        raise InputError(f"--batch-size {config.batch_size}", reason, mend)


def bytes_on(shape: GPT2Config, config: TrainConfig, device: torch.device, dtype: torch.dtype, world: World) -> int:
    """What weights, gradient and optimizer take of one device, at the least: activations come on top."""
    parameters, narrow, size = count_parameters(shape), dtype.itemsize, world.size
    if config.parallel == "fsdp" and size > 1:
        block = count_parameters(
            dataclasses.replace(shape, n_layer=1)
        )  # with embedding and head, the largest that is put together
        # masters, gradient, moments, FSDP's shards, and their gradient until it is taken
        mine = (24 + 4 * (config.accumulate > 1)) * parameters // size
        return mine + (narrow + 4) * block
    own = parameters // size if divides(config, device, world) else parameters
    copies = 0 if dtype == torch.float32 else 2 * narrow * parameters + 4 * own  # working and its gradient; masters
    is_apart = dtype != torch.float32 or config.accumulate > 1
    summed = 4 * parameters if shares(config, world)[1] > 1 and is_apart else 0
    return copies + summed + 8 * own + (8 * parameters if dtype == torch.float32 else 0)


def check_memory(
    shape: GPT2Config, config: TrainConfig, device: torch.device, dtype: torch.dtype, world: World
) -> None:
    """Raises InputError where a GPU has less memory than the model takes before it has seen a poem."""
    if device.type != "cuda":
        return
    needed, there = bytes_on(shape, config, device, dtype, world), torch.cuda.get_device_properties(device).total_memory
    if needed <= there:
        return
    gib = 2.0**30
    reason = f"weights and optimizer of {count_parameters(shape) / 1e6:,.0f} M parameters take {needed / gib:,.1f} GiB a GPU, this one has {there / gib:,.1f}"
    mend = "use a smaller model, or several GPUs with torchrun and --parallel fsdp"
    if config.parallel == "fsdp" and world.size > 1:
        mend = "use a smaller model, or more GPUs"
    raise InputError(f"--device {config.device}", reason, mend)


@contextlib.contextmanager
def threads(config: TrainConfig, world: World) -> Iterator[None]:
    """As many as are this process's share of the cores, where OMP_NUM_THREADS is not set or is the one that torchrun sets. With --exact what
    OMP_NUM_THREADS says, or one: some products end in other digits in another number of threads. As before, at the end."""
    before, asked = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS", "1")
    if config.exact:
        torch.set_num_threads(int(asked) if asked.isdecimal() and int(asked) else 1)
    elif world.size > 1 and asked == "1":
        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)  # macOS
        torch.set_num_threads(max(1, len(mine) // world.local_size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def divides(config: TrainConfig, device: torch.device, world: World) -> bool:
    """Is the update divided among the processes? auto: on GPUs, where less goes over the wire then and each updates less."""
    return world.size > 1 and (config.parallel == "sharded" or (config.parallel == "auto" and device.type == "cuda"))
