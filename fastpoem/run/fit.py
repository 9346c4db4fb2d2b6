"""`fit` puts the house together: device, model, store, order, step, loop; and leaves RUN/model behind.

Everything that can be wrong with what the user gave is found before the run's folder is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpoem.config import RATE_BY_WIDTH, TrainConfig
from fastpoem.corpus.feed import Feed, Shape, size_of_share
from fastpoem.corpus.plan import BucketOrder, Order, TextOrder, key_of
from fastpoem.corpus.store import TokenStore
from fastpoem.corpus.tokenizer_files import for_prompts, never_ids
from fastpoem.corpus.vocabulary import numbering
from fastpoem.doctor.trust import decide
from fastpoem.engine.batching import choose_batching
from fastpoem.engine.build import Trusted, build_step
from fastpoem.engine.compile import keep_caches_in
from fastpoem.engine.exact import shares
from fastpoem.engine.fsdp import FullySharded
from fastpoem.engine.memory import enough_memory, keep_freed_memory
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.precision import choose_dtype
from fastpoem.engine.world import World
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.attention import Varlen
from fastpoem.model.flash import find_varlen, insist_on_flash, plain_attention, why_not_flash
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.model.grow import draw_rows
from fastpoem.model.vocabulary import GENERATION, Narrowed, generation_config
from fastpoem.run import best, checkpoint, folder
from fastpoem.run.calendar import DROPOUT
from fastpoem.run.card import model_card
from fastpoem.run.console import Voice
from fastpoem.run.given import Given, order_of, take
from fastpoem.run.loop import Loop, check_state
from fastpoem.run.opened import Run
from fastpoem.run.processes import check_memory, check_shares, choose_device, divides, threads
from fastpoem.run.samples import Samples, Writer
from fastpoem.run.saving import NotSaved
from fastpoem.run.summary import after, before
from fastpoem.run.trackers import check_installed
from fastpoem.signals import StopRequest, ask

WORDS = {"pack": "packed ({0})", "bucket": "of like length ({0})", "pad": "padded ({0})"}
GENERATE = "python -m fastpoem.generate"
LOOKED_AT = 20_000  # steps of an epoch whose sizes are looked up before training: a second at the most


def fit(
    config: TrainConfig,
    voice: Voice | None = None,
    generate: str | None = GENERATE,
    on_row: Callable[[dict[str, Any]], object] | None = None,
) -> Run:
    """Train as `config` (checked) says. Raises InputError for what the user gave wrongly, Diverged when numbers go wrong, NotSaved where the
    disk does not take the result. generate: the command that writes poems, as it is called here; None: Python calls. on_row: gets a copy of
    each row of metrics.jsonl; what it raises is raised after a checkpoint."""
    about: str | None = None
    world = World.of_environment()
    if not world.is_first:
        with (
            tempfile.TemporaryDirectory(prefix="fastpoem-") as scratch,
            assembled(config, Voice(quiet=True), Path(scratch), world) as (loop, _),
            StopRequest() as stop,
        ):
            return Run(Path(loop.config.out or ""), [], loop.run(stop))
    with (
        assembled(config, voice or Voice(config.quiet, config.lang), world=world) as (loop, export),
        StopRequest() as stop,
    ):
        loop.on_row = on_row
        try:
            stopped = loop.run(stop)
        except NotSaved:
            # Trained to the end: the model is smaller than a checkpoint, and may still fit.
            if loop.stopped_by(stop) is None:
                with contextlib.suppress(OSError):
                    export(loop.folder / "model")
            raise
        if stopped is None:
            with loop.voice.phase("reading the best checkpoint"):
                about, weights = best.choose(loop.folder, loop.best, loop.done, wanted=config.best)
            try:
                with loop.voice.phase("writing the model"):
                    export(loop.folder / "model", weights)
            except OSError as error:
                reason = f"{loop.folder / 'model'} could not be written: {error}"
                raise NotSaved(
                    f"{reason}; the last checkpoint is complete: make room, then --resume writes it"
                ) from error
    run = Run(loop.folder, loop.metrics.rows, loop.stopped_by(stop))
    if run.stopped_by is None:
        loop.voice.table(after(loop, generate))
        if about is not None:
            loop.voice.say(about)
        loop.voice.say("the trained model is in {0}", run.model)
        if config.sample is not None and not loop.voice.quiet:
            with loop.voice.phase("writing a few poems"):
                poems = run.generate(config.sample, seed=config.seed)
            for poem in poems:
                loop.voice.say(poem)
    return run


@contextlib.contextmanager
def assembled(
    config: TrainConfig, voice: Voice, scratch: Path | None = None, world: World | None = None
) -> Iterator[tuple[Loop, Callable[..., None]]]:
    """The loop of a run, ready to go and holding its folder, and what writes the trained model into a folder: the loop's weights, or the
    best ones. scratch: a folder for all that would be written; None: the run's own. world: the processes that train together, of which the
    first has the run's folder; None: this one alone."""
    world = world or World()
    keep_caches_in(config.cache_dir)
    device = choose_device(config, world, voice)
    if device.type == "cpu":
        keep_freed_memory()
    check_shares(config, device, world)
    world.join(device)
    try:
        with threads(config, world):
            yield from _assembled(config, voice, scratch, world, device)
            world.meet()
    except BaseException as error:
        if isinstance(error, InputError):
            error.here = True
        world.fail()
        raise
    finally:
        world.leave()


def _assembled(
    config: TrainConfig, voice: Voice, scratch: Path | None, world: World, device: torch.device
) -> Iterator[tuple[Loop, Callable[..., None]]]:
    """`assembled`, the processes having met."""
    check_installed(config.trackers)
    if world.restarts and config.out is not None and folder.begun_by_this_torchrun(Path(config.out).expanduser()):
        config = dataclasses.replace(config, resume=True)
    chosen = world.agreed(lambda: folder.choose(config))
    if not world.is_first:  # which has a scratch folder of its own, and tells of the first's
        config = dataclasses.replace(config, out=str(chosen))
    out = chosen if scratch is None else scratch / "run"
    if "tensorboard" in config.trackers and str(chosen).encode("utf-8", "replace").decode() != str(chosen):
        raise InputError(
            "--out", "is not UTF-8, which TensorBoard needs", "name another folder, or leave TensorBoard out"
        )
    if scratch is not None:  # nobody else is to hear of what is only tried
        config = dataclasses.replace(config, log_to=(), tensorboard=False)

    ask()
    with world.first():
        given = take(config, voice, scratch if world.is_first else None)
    shape, tokenizer, store, ids = given.shape, given.tokenizer, given.store, given.ids
    if config.lr is None:
        config = dataclasses.replace(config, lr=RATE_BY_WIDTH / shape.n_embd)
        voice.say("peak learning rate {0:.2g} for a model {1} wide", config.lr, shape.n_embd)
    elif config.lr == 0:
        voice.say("--lr 0: nothing will be learned")
    elif config.from_scratch and config.lr < RATE_BY_WIDTH / shape.n_embd / 4:
        right = RATE_BY_WIDTH / shape.n_embd
        voice.say(
            "--lr {0:.2g} is for going on from trained weights: from scratch, about {1:.1g} learns more",
            config.lr,
            right,
        )
    computed = shape if ids is None else dataclasses.replace(shape, vocab_size=len(ids))
    with voice.phase("measuring which precision is faster"):
        dtype, why = world.agreed(lambda: _choose_precision(config, device, computed, store, out))
    check_memory(computed, config, device, dtype, world)
    asked = config  # as config.json has it: auto stays auto there
    with voice.phase("choosing how to batch"):
        config, trusted, varlen, about_batches = _choose_batching(config, device, dtype, computed, out, voice, world)
    if not trusted.sdpa:
        plain_attention()
    is_sharded = config.parallel == "fsdp" and world.size > 1
    if is_sharded:
        config = dataclasses.replace(config, compile="off", graphs="off")
    order = order_of(config, store, given.held)
    ask()
    goes_on = not world.is_first or (config.resume and bool(checkpoint.listed(out)))  # others have the first's weights
    what = "making the model" if config.from_scratch or goes_on else "reading the weights of {0}"
    with voice.phase(what, given.model_folder):
        model = _model(config, given, varlen, goes_on=goes_on)
        narrowed = None if ids is None else Narrowed(model, ids)
        with enough_memory(config, device):
            rule: dict[str, Any] = dict(weight_decay=config.weight_decay, max_norm=config.max_grad_norm)
            rule["kernels"] = trusted.kernels
            optimizer: FlatAdamW
            if is_sharded:
                optimizer = FullySharded(model, device, dtype, world, **rule)
            else:
                slices, divided = (world.rank, world.size), divides(config, device, world)
                optimizer = FlatAdamW(model.to(device), device, dtype, slices=slices, divided=divided, **rule)
        special = {"bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id, "pad_token_id": tokenizer.pad_id}
        files = tokenizer.files | for_prompts(tokenizer.files, tokenizer, store.manifest["source"].get("convert"))
        beside = hub.companions(hub.saved_config(given.raw_config, shape, special), files)
        never = never_ids(tokenizer, shape.vocab_size) | ({*narrowed.others()} if narrowed is not None else set())
        beside[GENERATION] = generation_config(special, never, shape.n_positions)

    ask()
    with folder.claim(out, fresh=not config.resume) as claim, enough_memory(config, device):
        with voice.phase("compiling and recording the step" if device.type == "cuda" else "getting the step ready"):
            identity = folder.identity(config, store, shape, dtype, order, given.validation)
            table = None if ids is None else numbering(ids, store)
            feed = Feed(store, config.batching, rounded=device.type == "cuda" and config.graphs != "off", table=table)
            pad_id = tokenizer.pad_id if table is None else int(table[tokenizer.pad_id])
            shapes = _shapes(order, feed, *shares(config, world))
            step = build_step(config, model.train(), optimizer, feed, pad_id, shapes, voice.say, trusted, world)
            writer = Writer(model, tokenizer, config.sample, sorted(never), ids, config.seed)
        ask()  # from here on a run has begun, which stops with a checkpoint
        loop = Loop(
            config,
            out,
            device,
            model,
            step,
            order,
            feed,
            given.validation,
            voice,
            identity,
            beside,
            claim.hold,
            narrowed,
            world,
            Samples(out, writer, claim.hold, voice.say) if world.is_first and not is_sharded else None,
        )
        torch.manual_seed(config.seed)
        with voice.phase("reading the newest checkpoint"):
            state = world.agreed(lambda: _resume(loop, asked) if config.resume else None)
        if state is None and goes_on and world.is_first:  # the model has no weights yet
            raise InputError(out, "its checkpoints vanished while this command began", "give it again")
        with voice.phase("waiting for the other processes"):
            world.meet()
        loop.train_state.distribute(world)
        if not world.is_first:  # where PyTorch's generator draws (not on a CPU), each has masks of its own
            torch.manual_seed(key_of(config.seed, DROPOUT, loop.done, world.rank) >> 1)
        with folder.refused_by_the_disk(out):
            loop.begin(state)
            claim.config = folder.write_config(out, asked, identity, store, device, dtype)
        if not voice.quiet:
            voice.table(before(config, given, loop, chosen, dtype, why, about_batches))
        if state is not None and loop.done > loop.last_step:
            voice.say(f"step {loop.done} (past the {loop.last_step} asked for) is done: nothing is left to do")
        elif state is not None:
            left = "nothing is left to do" if loop.is_over else "going on"
            voice.say("step {0} of {1} is done: " + left, loop.done, loop.last_step)

        def export(goal: Path, weights: Mapping[str, Tensor] | None = None) -> None:
            claim.hold()
            rows = loop.metrics.rows
            if weights is None:
                weights = loop.train_state.weights()
            else:
                rows = [row for row in rows if row["step"] <= loop.best.step]
            settings, held = identity["settings"], len(given.validation.rows)
            card = model_card(config, given.hub_name, settings, store, held, shape, tokenizer, rows)
            hub.write_folder(goal, weights, {**beside, "README.md": card})

        try:
            yield loop, export
        finally:
            loop.close()


def _model(config: TrainConfig, given: Given, varlen: Varlen | None, *, goes_on: bool) -> GPT2:
    """The model with the weights that training begins with; with any at all where it goes on from a checkpoint."""
    model = GPT2(given.shape, varlen)
    model.transformer.is_checkpointed = config.checkpoint_activations
    if config.from_scratch:
        model.initialise(config.seed)
    elif not goes_on:
        hub.load_weights(model, given.model_folder, given.rows)
        if given.fresh:
            draw_rows(model.transformer.wte.weight, given.fresh, config.seed)
    return model


def _resume(loop: Loop, config: TrainConfig) -> dict[str, Any] | None:
    """Bring the loop's tensors to the newest whole checkpoint; its state, None where there is none. Raises InputError."""

    def check(state: Mapping[str, Any]) -> None:
        check_state(state)
        folder.refuse_another_run(state["identity"], loop.identity, loop.folder, config)

    tensors = loop.train_state.tensors()
    state = checkpoint.read_newest(loop.folder, tensors, check, loop.voice.say)
    if state is None:
        loop.voice.say(f"{loop.folder} holds no checkpoint to resume: starting from the beginning")
        return None
    loop.train_state.adopt(tensors)
    before, now = state["length"], loop.calendar.length
    if config.schedule != "constant" and before != now and state["step"] < loop.last_step:
        loop.voice.say(f"the learning rate falls over {now} from here on, where it fell over {before}")
    rose, rises = state["warmup"], loop.calendar.warmup
    if rose != rises and state["step"] < min(max(rose, rises), loop.last_step):
        loop.voice.say(f"the learning rate rises over {rises} steps, where it rose over {rose}")
    before, now = state["arithmetic"], loop.arithmetic
    if before != now and state["step"] < loop.last_step:
        loop.voice.say(
            f"computed by {now} from here on, where it was by {before}: the last digits differ, and dropout drops others"
        )
    return state


def _choose_precision(
    config: TrainConfig, device: torch.device, shape: GPT2Config, store: TokenStore, out: Path
) -> tuple[torch.dtype, str]:
    """(dtype, why). A run that goes on keeps what auto came to when it began: asked again, a machine may answer otherwise."""
    before = checkpoint.precision(out) if config.resume and config.precision == "auto" else None
    tokens = config.batch_size * store.manifest["counts"]["tokens"] // store.rows
    dtype, why = choose_dtype(before or config.precision, device, shape, tokens)
    return dtype, "as the run began" if before else why


def _choose_batching(
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    shape: GPT2Config,
    out: Path,
    voice: Voice,
    world: World,
) -> tuple[TrainConfig, Trusted, Varlen | None, str]:
    """(the settings with what auto came to, what of the fast path is taken, variable-length attention for packed batches, a few words on
    the batches). A run that goes on keeps what it began with. Raises InputError for what `config` insists on and cannot be had."""
    if config.attention == "flash":
        if reason := why_not_flash(device, dtype):
            raise InputError("--attention flash", reason, "use --attention auto")
        insist_on_flash()
    head_width, auto = shape.n_embd // shape.n_head, config.batching == "auto"

    def choose() -> tuple[Any, Trusted, str]:
        before = checkpoint.setting(out, "batching", ("pack", "bucket", "pad")) if config.resume and auto else None
        batching, why = choose_batching(config, device, dtype, head_width, before)
        settled = dataclasses.replace(config, batching=batching)
        undecided = auto and before is None and batching == "pack"  # a kernel that fails its check may still change it
        trusted = decide(config if undecided else settled, device, dtype, shape.vocab_size, voice.say)
        if undecided and not trusted.varlen:
            batching, why = "bucket", "packed attention failed its check"
        return batching, trusted, why

    batching, trusted, why = world.agreed(choose)
    config = dataclasses.replace(config, batching=batching)
    varlen = None
    if batching == "pack" and config.attention != "sdpa" and trusted.varlen:
        varlen, what = find_varlen(device, dtype, head_width)
        if device.type == "cuda" and why != what:
            why += f"; attention inside them: {what}"
    return config, trusted, varlen, voice.words(WORDS[batching], voice.words(why))


def _shapes(order: Order, feed: Feed, mine: range, parts: int) -> list[Shape]:
    """The shapes of batches that are known before training, or where these are divided of the parts `mine` of `parts`: all of them in bucket order; of packed ones, where they are rounded to few, those
    of the first epoch's beginning; otherwise the first step's and its like; of padded ones also the largest, in whose memory the
    recordings of all others fit."""
    if isinstance(order, BucketOrder):
        return [Shape(size_of_share(order.batch, parts), length) for length in order.lengths_used()]
    first = feed(order(0, 0), mine[0], parts).shape
    if first.packed and feed.rounded and isinstance(order, TextOrder):
        poems = order.poems_of(0, 0, min(order.steps, LOOKED_AT))
        return feed.packed_shapes(*poems, order.batch, mine, parts)
    if first.packed:
        return [first]
    longest = int(feed.store.buckets[-1].lengths.max())
    return [first._replace(longest=length) for length in (first.longest, (first.longest + 6) // 8 * 8 + 1, longest)]
