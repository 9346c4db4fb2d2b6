"""`fit` puts the house together: device, model, store, order, step, loop; and leaves RUN/model behind.

Everything that can be wrong with what the user gave is found before the run's folder is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpoem.config import RATE_BY_WIDTH, TrainConfig
from fastpoem.corpus.feed import Feed, Shape
from fastpoem.corpus.plan import BucketOrder, Order
from fastpoem.corpus.store import TokenStore
from fastpoem.corpus.vocabulary import numbering
from fastpoem.engine.build import build_step
from fastpoem.engine.memory import enough_memory, keep_freed_memory
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.precision import choose_device, choose_dtype
from fastpoem.engine.trust import decide, keep_caches_in
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.attention import Varlen
from fastpoem.model.flash import find_varlen, insist_on_flash, plain_attention, why_not_flash
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.model.vocabulary import GENERATION, Narrowed
from fastpoem.run import checkpoint, folder
from fastpoem.run.given import take
from fastpoem.run.loop import Loop, NotSaved, check_state
from fastpoem.run.metrics import Voice
from fastpoem.run.signals import StopRequest


@dataclass
class Run:
    """A finished (or stopped) run: its folder, the rows of metrics.jsonl, and the signal that stopped it, if one did."""

    folder: Path
    metrics: list[dict[str, Any]]
    stopped_by: int | None = None

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def generate(self, prompt: str, **options: Any) -> list[str]:
        """Poems that begin with `prompt`; options as of `fastpoem.generate.sample`: count, top_k, top_p, temperature, seed …"""
        from fastpoem.generate import sample

        return sample(self.model, prompt, **options)


def fit(config: TrainConfig, voice: Voice | None = None) -> Run:
    """Train as `config` (checked) says. Raises InputError for what the user gave wrongly, Diverged when numbers go wrong, NotSaved
    where the disk does not take the result."""
    with assembled(config, voice or Voice()) as (loop, export), StopRequest() as stop:
        try:
            loop.run(stop)
        except NotSaved:
            if stop.signal is None:  # trained to the end: the model is smaller than a checkpoint, and may still fit
                with contextlib.suppress(OSError):
                    export(loop.folder / "model")
            raise
        if stop.signal is None:
            try:
                export(loop.folder / "model")
            except OSError as error:
                reason = f"{loop.folder / 'model'} could not be written: {error}"
                raise NotSaved(
                    f"{reason}; the last checkpoint is complete: make room, then --resume writes it"
                ) from error
    run = Run(loop.folder, loop.metrics.rows, stop.signal)
    if run.stopped_by is None:
        loop.voice.say(f"the trained model is in {run.model}")
        for poem in run.generate(config.sample, seed=config.seed) if config.sample is not None else ():
            loop.voice.say(poem)
    return run


@contextlib.contextmanager
def assembled(config: TrainConfig, voice: Voice) -> Iterator[tuple[Loop, Callable[[Path], None]]]:
    """The loop of a run, ready to go and holding its folder, and what writes the trained model into a folder."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise InputError("torchrun", "training on several devices is not supported yet", "start one process")
    keep_caches_in(config.cache_dir)
    device = choose_device(config.device, voice.say)
    if device.type == "cpu":
        keep_freed_memory()
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard", "TensorBoard is not installed", "pip install 'fastpoem[curves]'")
    out = folder.choose(config)
    if config.tensorboard and str(out).encode("utf-8", "replace").decode() != str(out):
        raise InputError(
            "--out", "is not UTF-8, which TensorBoard needs", "name another folder, or leave --tensorboard out"
        )

    given = take(config, voice)
    shape, tokenizer, store, order, ids = given.shape, given.tokenizer, given.store, given.order, given.ids
    if config.lr is None:
        config = dataclasses.replace(config, lr=RATE_BY_WIDTH / shape.n_embd)
        voice.say(f"peak learning rate {config.lr:.2g} for a model {shape.n_embd} wide")
    computed = shape if ids is None else dataclasses.replace(shape, vocab_size=len(ids))
    dtype, why = _choose_precision(config, device, computed, store, out)
    varlen, about_attention = _choose_attention(config, device, dtype, shape.n_embd // shape.n_head)
    trusted = decide(config, device, dtype, computed.vocab_size, voice.say)
    if not trusted.sdpa:
        plain_attention()
    if varlen is not None and not trusted.varlen:
        varlen, about_attention = None, None
    goes_on = config.resume and bool(checkpoint.listed(out))
    model = _model(config, shape, varlen, given.model_folder, goes_on=goes_on)
    narrowed = None if ids is None else Narrowed(model, ids)
    with enough_memory(config, device):
        model.to(device)
        optimizer = FlatAdamW(
            model,
            device,
            dtype,
            weight_decay=config.weight_decay,
            max_norm=config.max_grad_norm,
            kernels=trusted.kernels,
        )
    special = {"bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id, "pad_token_id": tokenizer.pad_id}
    beside = hub.companions(hub.saved_config(given.raw_config, shape, special), tokenizer.files)
    if narrowed is not None:
        beside[GENERATION] = narrowed.generation_config(special)

    with folder.claim(out, fresh=not config.resume) as claim, enough_memory(config, device):
        identity = folder.identity(config, store, shape, dtype)
        table = None if ids is None else numbering(ids, store)
        feed = Feed(store, config.batching, rounded=device.type == "cuda" and config.graphs != "off", table=table)
        pad_id = tokenizer.pad_id if table is None else int(table[tokenizer.pad_id])
        shapes = _shapes(order, feed)
        step = build_step(config, model.train(), optimizer, feed, pad_id, shapes, voice.say, trusted)
        loop = Loop(
            config, out, device, model, step, order, feed, given.held, voice, identity, beside, claim.hold, narrowed
        )
        torch.manual_seed(config.seed)
        state = _resume(loop, config) if config.resume else None
        if state is None and goes_on:  # the model has no weights yet
            raise InputError(out, "its checkpoints vanished while this command began", "give it again")
        with folder.refused_by_the_disk(out):
            loop.begin(state)
            folder.write_config(out, config, identity, store, device, dtype)
        if about_attention:
            voice.say(about_attention)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        voice.say(f"{parameters:.1f} M parameters on {device} in {str(dtype)[6:]} ({why})")
        voice.say(
            f"{order.steps:,} steps an epoch of {config.batch_size} poems, {len(given.held):,} poems held out for validation"
        )
        if state is not None:
            left = "nothing is left to do" if loop.done >= loop.last_step else "going on"
            end = f"of {loop.last_step}" if loop.done <= loop.last_step else f"(past the {loop.last_step} asked for)"
            voice.say(f"step {loop.done} {end} is done: {left}")

        def export(goal: Path) -> None:
            claim.hold()
            weights = dict(optimizer.named(optimizer.master))
            hub.write_folder(goal, weights if narrowed is None else narrowed.widen(weights), beside)

        try:
            yield loop, export
        finally:
            loop.close()


def _model(config: TrainConfig, shape: GPT2Config, varlen: Varlen | None, source: Path, *, goes_on: bool) -> GPT2:
    """The model with the weights that training begins with; with any at all where it goes on from a checkpoint."""
    # 4 bytes each: weights, gradient, two moments, and a checkpoint's copies of all but the gradient
    hub.refuse_too_large(shape, source, 28, "to train")
    model = GPT2(shape, varlen)
    if config.from_scratch:
        model.initialise(config.seed)
    elif not goes_on:
        hub.load_weights(model, source)
    return model


def _resume(loop: Loop, config: TrainConfig) -> dict[str, Any] | None:
    """Bring the loop's tensors to the newest whole checkpoint; its state, None where there is none. Raises InputError."""

    def check(state: Mapping[str, Any]) -> None:
        check_state(state)
        folder.refuse_another_run(state["identity"], loop.identity, loop.folder)

    tensors = loop.tensors()
    state = checkpoint.read_newest(loop.folder, tensors, check, loop.voice.say)
    if state is None:
        loop.voice.say(f"{loop.folder} holds no checkpoint to resume: starting from the beginning")
        return None
    loop.adopt(tensors)
    before, now = state["length"], loop.length
    if config.schedule != "constant" and before != now and state["step"] < loop.last_step:
        loop.voice.say(f"the learning rate falls over {now} from here on, where it fell over {before}")
    return state


def _choose_precision(
    config: TrainConfig, device: torch.device, shape: GPT2Config, store: TokenStore, out: Path
) -> tuple[torch.dtype, str]:
    """(dtype, why). A run that goes on keeps what auto came to when it began: asked again, a machine may answer otherwise."""
    before = checkpoint.precision(out) if config.resume and config.precision == "auto" else None
    tokens = config.batch_size * store.manifest["counts"]["tokens"] // store.rows
    dtype, why = choose_dtype(before or config.precision, device, shape, tokens)
    return dtype, "as the run began" if before else why


def _choose_attention(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, head_width: int
) -> tuple[Varlen | None, str | None]:
    """(variable-length attention for packed batches, what to say about it). Raises InputError where --attention flash cannot be had."""
    if config.attention == "flash":
        if reason := why_not_flash(device, dtype):
            raise InputError("--attention flash", reason, "use --attention auto")
        insist_on_flash()
    if config.batching != "pack" or config.attention == "sdpa":
        return None, None
    varlen, what = find_varlen(device, dtype, head_width)
    return varlen, f"attention inside packed batches: {what}" if device.type == "cuda" else None


def _shapes(order: Order, feed: Feed) -> list[Shape]:
    """The shapes of batches that are known before training: all of them in bucket order, otherwise the first step's and its like; of
    padded ones also the largest, in whose memory the recordings of all others fit."""
    if isinstance(order, BucketOrder):
        return [Shape(order.batch, length) for length in order.lengths_used()]
    first = feed(order(0, 0)).shape
    if first.packed:
        return [first]
    longest = int(feed.store.buckets[-1].lengths.max())
    return [first._replace(longest=length) for length in (first.longest, (first.longest + 6) // 8 * 8 + 1, longest)]
