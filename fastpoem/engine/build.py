"""The step as this device runs it: compiled or not, recorded as graphs or not, and one line of why."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from fastpoem_kernels import gradient_norm, native

from fastpoem.config import TrainConfig
from fastpoem.corpus.feed import Feed, Shape, size_of_share
from fastpoem.engine.compile import combines, compiled_pieces, forms, one_of_each_form, why_not_compile
from fastpoem.engine.exact import Tree, shares
from fastpoem.engine.fsdp import FullySharded
from fastpoem.engine.graphs import Graphs
from fastpoem.engine.kernels import OURS, Kernels
from fastpoem.engine.optim import ALIGN, FlatAdamW
from fastpoem.engine.step import Pieces, Sums, TrainStep, home
from fastpoem.engine.world import World
from fastpoem.errors import InputError, first_line
from fastpoem.model.gpt2 import GPT2
from fastpoem.signals import ask

RESIDENT = 1 << 30  # bytes of a corpus that a GPU's memory is not asked whether it can spare


class Trusted(NamedTuple):
    """What a run takes where the user has not said otherwise. False: it failed its check on this card."""

    kernels: Kernels = OURS
    sdpa: bool = True  # scaled_dot_product_attention's fused kernels
    varlen: bool = True
    compile: bool = True
    graphs: bool = True
    combined: bool = True  # small kernels of compiled code share launches


def build_step(
    config: TrainConfig,
    model: GPT2,
    optimizer: FlatAdamW,
    feed: Feed,
    pad_id: int,
    shapes: Sequence[Shape],
    say: Callable[[str], None],
    trusted: Trusted,
    world: World | None = None,
) -> TrainStep:
    """The step, warmed up for `shapes` (those known beforehand) so that the first one trains at once. world: the processes that train
    together; None: this one alone. Raises InputError for what `config` insists on and this machine has not."""
    device, store, world = optimizer.master.device, feed.store, world or World()
    _, parts = shares(config, world)
    poems = size_of_share(config.batch_size, parts)
    shape = model.config
    drops = max(shape.embd_pdrop, shape.attn_pdrop, shape.resid_pdrop) > 0
    if device.type == "cuda" and config.checkpoint_activations and drops:
        # What is computed again must drop what was dropped: PyTorch puts its generator back for that, between two kernels of the host's.
        reason = "dropout with --checkpoint-activations is neither compiled nor recorded"
        for name, value in (("compile", config.compile), ("graphs", config.graphs)):
            if value == "on":
                raise InputError(f"--{name} on", reason, f"use --dropout 0, or --{name} auto")
        say(f"kernels are launched one by one: {reason}")
        config = dataclasses.replace(config, compile="off", graphs="off")
    compiles = _compiles(config, device, say) and trusted.compile
    if config.graphs == "on" and device.type != "cuda":
        raise InputError("--graphs on", f"CUDA graphs run on CUDA devices, not on {device}", "use --graphs auto")
    if device.type == "cuda" and store.dtype.itemsize * sum(b.rows * b.length for b in store.buckets) <= RESIDENT:
        source = feed.corpus().to(device)
    else:
        kind = torch.int16 if store.dtype.itemsize == 2 else torch.int32
        source = torch.zeros(poems * store.buckets[-1].length, dtype=kind, device=home(device))
    plain, is_sharded = Pieces.plain(model, device), isinstance(optimizer, FullySharded)
    if is_sharded:
        plain = plain._replace(autograd=True)
    settings: dict[str, Any] = dict(poems=poems, pad_id=pad_id, pad_targets=config.loss_on_padding)
    if parts > 1:
        add: Callable[[Sums], object] | None = None
        if config.exact:
            tree = Tree(parts, world)
            add, settings["keep"] = tree.total, tree.keep
        if is_sharded:
            add = partial(_add_the_rest, world, optimizer)  # FSDP has summed the gradient
        elif optimizer.is_divided:
            add = partial(_add_in_slices, world, optimizer, add)
            settings["gather"] = partial(world.gather, mine=optimizer.mine)
        reduce = world.reduce_shards if is_sharded else world.reduce
        settings |= dict(reduce=partial(reduce, add=add), accumulate=config.accumulate)
    step = TrainStep(plain, optimizer, source, **settings)
    if compiles:
        _compile(step, model, shapes, config.compile == "on", trusted.combined and combines(), say)
    if device.type == "cpu" and (no_c := native.why_not(optimizer.working.dtype)) is not None:
        say(f"PyTorch's operators between the products, slower than C ({no_c})")
    if device.type == "cuda" and config.graphs != "off" and trusted.graphs:
        begin = time.perf_counter()
        graphs = Graphs(step, say)
        graphs.record(shapes)
        if graphs.broken and config.graphs == "on":
            raise InputError("--graphs on", "the step could not be recorded here", "use --graphs auto")
        if graphs.recorded:
            step.launch, step.launch_update = graphs, graphs.update
            took = time.perf_counter() - begin
            say(
                f"{len(graphs.recorded)} lengths recorded as CUDA graphs in {took:.1f} s, {graphs.bytes / 2**20:,.0f} MiB"
            )
    return step


def _add_in_slices(world: World, optimizer: FlatAdamW, add: Callable[[Sums], object] | None, sums: Sums) -> None:
    """Add up what a divided update needs: on a GPU this process's slice of the gradient, half of what the whole would take. gloo makes that of
    sums of the whole, so there it is one, and the norm has the bits of an update that is not divided."""
    if sums.flat.is_cuda:
        world.scatter_sum(sums.gradient, optimizer.mine)
        _add_the_rest(world, optimizer, sums)
    else:
        (add or (lambda all_of_them: world.add_up(all_of_them.flat)))(sums)
        sums.norm.copy_(gradient_norm(sums.gradient[: optimizer.used]))


def _add_the_rest(world: World, optimizer: FlatAdamW, sums: Sums) -> None:
    """Add up all but the gradient, of which this process has its own part of the sum, and find the norm of the whole."""
    sums.norm.copy_(gradient_norm(sums.gradient[optimizer.mine]).square())
    world.add_up(sums.flat[-ALIGN:])
    sums.norm.sqrt_()


def _compile(
    step: TrainStep, model: GPT2, shapes: Sequence[Shape], insists: bool, combined: bool, say: Callable[[str], None]
) -> None:
    """Compile the step: with combined kernels, where these fail without them, and where that fails not at all; but with `insists` the
    last error is raised."""
    begin, plain = time.perf_counter(), step.pieces
    for together in (True, False) if combined else (False,):
        step.pieces = compiled_pieces(model, combined=together)
        try:
            for shape in one_of_each_form(shapes):
                ask()
                with step.rehearsal(shape):
                    step.work(shape)
        except Exception as error:
            if not together and insists:
                raise
            say(
                f"the compiled step failed with combined kernels ({first_line(error)}): each has a launch of its own"
                if together
                else f"the model could not be compiled ({first_line(error)}): PyTorch's own kernels are used"
            )
        else:
            step.forms = forms
            say(f"compiled in {time.perf_counter() - begin:.0f} s ({forms()} forms)")
            return
    step.pieces = plain


def _compiles(config: TrainConfig, device: torch.device, say: Callable[[str], None]) -> bool:
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return False
    reason = why_not_compile(device)
    if reason is not None and config.compile == "on":
        raise InputError("--compile on", reason, "install it, or use --compile auto")
    if reason is not None:
        say(f"the model is not compiled: {reason}")
    return reason is None
